"""What a step costs, counted: FLOPs and kept bytes (``step_cost``, ``flops``), and on a CUDA device that is not there
launches, bytes moved, waits and an estimate for a named card (``card_step``, ``count``, ``fake_device``, ``cards``).

May import the engine and all before it; training never imports it.
"""
