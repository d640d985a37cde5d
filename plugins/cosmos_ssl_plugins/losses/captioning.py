"""Captioning: how surprising a picture's texts are to a decoder that sees the picture."""

from __future__ import annotations

from cosmos_ssl.api import Loss, LossOutput, Need, Spec, StepContext
from cosmos_ssl.functional import upload


class Captioning(Loss):
    """Cross-entropy of the tokens of each text, the mean over a text's tokens, then over texts (CapPa, arXiv
    2306.07915, section 3).

    The first token is given, a text without others counts 0.
    """

    def __init__(self, spec: Spec, *, head: str, group: str = "global") -> None:
        """Raises ValueError for a head without the output ``nll``.

        head: the head that gives -log p of each token, such as a ``caption_decoder``.
        group: the view group of the texts that it reads.
        """
        super().__init__()
        able = [name for name, outputs in spec.heads.items() if outputs.get("nll") == 1]
        if head not in able:
            raise ValueError(
                f"head: no head '{head}' with an output 'nll'. Heads that have it: {', '.join(able) or 'none'}"
            )
        self.head, self.group = head, group

    def requires(self) -> list[Need]:
        """The head on the student, and the texts, whose lengths count."""
        return [Need(head=self.head, outputs=("nll",)), Need(modality="text", group=self.group, kind="views")]

    def forward(self, ctx: StepContext) -> LossOutput:
        """One term."""
        nll = ctx.student.heads[self.head]["nll"][..., 0]  # [V, B, S]
        counts = ctx.views.text[self.group].lengths - 1
        (shares,) = upload(nll.device, 1 / counts.clamp_min(1).to(nll.dtype))
        return LossOutput(terms={"caption": (nll.sum(2) * shares).mean()})
