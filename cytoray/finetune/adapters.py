"""What of an encoder is trained: nothing but a linear head, LoRA on some of its Linears, or all.

| form | what |
|---|---|
| `linear` | a linear head on frozen features (Dausort et al., eq. 1) |
| `lora` | `lora:q,v:2` (Dausort et al., experiment 2) |
| `lora16` | `lora:q,k,v,o:16` (Dausort et al., experiment 3) |
| `lora:TARGETS:RANK` | targets of q, k, v, o, mlp; rank 0 trains a head on augmented images |
| `full` | every weight |
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import Tensor, nn

from cytoray.errors import InputError, raise_problems
from cytoray.models.encoder import Encoder
from cytoray.models.lora import TARGETS, add_lora, load_lora_state, lora_state_dict, merge_lora

KINDS = ("linear", "lora", "full")
SHORT = {"lora": "lora:q,v:2", "lora16": "lora:q,k,v,o:16"}


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One way to adapt an encoder. Make it with `parse_adapter`.

    Attributes:
        kind: one of `KINDS`.
        targets: of LoRA.
        rank: of LoRA.
        alpha: of LoRA; an update counts alpha / sqrt(rank).
        dropout: on the input of A, while training.
    """

    kind: str = "linear"
    targets: tuple[str, ...] = ()
    rank: int = 0
    alpha: float = 1.0
    dropout: float = 0.25

    def __post_init__(self) -> None:
        problems = []
        if self.kind not in KINDS:
            problems.append(f"kind {self.kind!r} is none of {', '.join(KINDS)}")
        wrong = [target for target in self.targets if target not in TARGETS]
        if wrong or (self.kind == "lora" and not self.targets):
            problems.append(
                f"targets {','.join(self.targets) or 'none'}: valid are {', '.join(TARGETS)}"
            )
        if self.rank < 0:
            problems.append(f"rank {self.rank} is negative")
        if not 0.0 <= self.dropout < 1.0:
            problems.append(f"dropout {self.dropout} must be at least 0 and below 1")
        raise_problems("this adapter cannot be used:", problems)

    @property
    def name(self) -> str:
        """Short, and fit for the name of a folder: `linear`, `full`, `lora-q.v-r2`."""
        if self.kind != "lora":
            return self.kind
        return f"lora-{'.'.join(self.targets)}-r{self.rank}"

    @property
    def trains_encoder(self) -> bool:
        """Whether the encoder's features change while it learns."""
        return self.kind == "full" or (self.kind == "lora" and self.rank > 0)

    @property
    def needs_pixels(self) -> bool:
        """Whether it learns from images; else from features computed once."""
        return self.kind != "linear"


def parse_adapter(text: str, *, alpha: float = 1.0, dropout: float = 0.25) -> Adapter:
    """An adapter by one of the forms above.

    Raises:
        InputError: another form, an unknown target or a bad rank; the valid ones are listed.
    """
    form = SHORT.get(text, text)
    if form in ("linear", "full"):
        return Adapter(kind=form)
    kind, _, rest = form.partition(":")
    targets, _, rank = rest.rpartition(":")
    if kind != "lora" or not targets or not rank.lstrip("-").isdigit():
        raise InputError(
            f"unknown adapter {text!r}; valid: linear, full, {', '.join(SHORT)}, "
            f"lora:TARGETS:RANK with targets of {', '.join(TARGETS)} (e.g. lora:q,v,mlp:8)"
        )
    chosen = tuple(part.strip() for part in targets.split(","))
    return Adapter(
        kind="lora",
        targets=tuple(dict.fromkeys(chosen)),
        rank=int(rank),
        alpha=alpha,
        dropout=dropout,
    )


def adapt(encoder: Encoder, adapter: Adapter) -> Encoder:
    """A copy of `encoder` in evaluation mode with the adapter's weights, which alone are trainable.

    Raises:
        InputError: LoRA on a model without the targets.
    """
    adapted = copy.deepcopy(encoder).eval()
    adapted.requires_grad_(adapter.kind == "full")
    if adapter.kind == "lora":
        add_lora(
            adapted.model,
            adapter.rank,
            targets=adapter.targets,
            alpha=adapter.alpha,
            dropout=adapter.dropout,
        )
    return adapted


def adapter_state(encoder: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """What training has changed in an adapted encoder: LoRA's A and B, or every weight."""
    model = encoder.get_submodule("model")
    if adapter.kind == "full":
        return {name: value.detach().clone() for name, value in model.state_dict().items()}
    return lora_state_dict(model)


def load_adapter_state(encoder: Encoder, adapter: Adapter, state: dict[str, Tensor]) -> None:
    """Put `adapter_state` into an encoder that `adapt` has made.

    Raises:
        InputError: weights of another encoder or adapter.
    """
    if adapter.kind == "full":
        try:
            encoder.model.load_state_dict(state)
        except RuntimeError as error:
            raise InputError(f"these weights are of another encoder: {error}") from error
    elif adapter.kind == "lora":
        load_lora_state(encoder.model, state)


def merged_weights(encoder: Encoder) -> dict[str, Tensor]:
    """Weights of an adapted encoder under timm's own keys, LoRA added in."""
    return merge_lora(encoder.model)
