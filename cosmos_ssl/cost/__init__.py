"""What a step costs: FLOPs and bytes, counted."""
