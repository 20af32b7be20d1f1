"""Public names to refedge's: each function takes a state dict under the public names.

What a file holds beside the part that is wanted is dropped by name: heads of the task a backbone
was trained on, indices that are computed here, weights that the public code never uses. Any other
name stays as it is, so that it is reported.
"""

from __future__ import annotations

import re

from torch import Tensor

State = dict[str, Tensor]


def slvit(state: State) -> State:
    """The official SLViT (github.com/NaturalKnight/SLViT)."""
    from ..layouts import from_official

    return _with_bert(from_official(state))


def lavt(state: State, bert_model: State | None) -> State:
    """The official LAVT (github.com/yz93/LAVT-RIS); ``lavt_one`` has BERT among its own weights.

    The gate behind the last stage is never used.
    """
    dropped = r"backbone\.layers\.3\.res_gate\.\d\.weight|.*\.(relative_position_index|attn_mask)"
    found = _with_bert(_without(state, dropped))
    return found | under("text_encoder.", bert(bert_model or {}))


def bert(state: State) -> State:
    """A ``BertModel`` of transformers, of any task and age, without its pooler."""
    inner = {k.removeprefix("bert."): v for k, v in state.items()}
    kept = _without(inner, r"pooler\..*|cls\..*|embeddings\.position_ids")
    return {_renamed(k, _BERT): v for k, v in kept.items()}


def mscan(state: State) -> State:
    """MSCAN as SegNeXt released it, as mmsegmentation did, or inside a whole SegNeXt.

    mmsegmentation calls ``dwconv.dwconv`` ``dwconv``.
    """
    state = {k.removeprefix("module."): v for k, v in state.items()}
    inner = {k.removeprefix("backbone."): v for k, v in state.items()}
    kept = _without(inner, r"(head|decode_head|auxiliary_head)\..*")
    return {_renamed(k, _MSCAN): v for k, v in kept.items()}


def swin(state: State) -> State:
    """Swin as trained on ImageNet, without its classifier."""
    return _without(state, r"norm\..*|head\..*|.*\.(relative_position_index|attn_mask)")


def deeplab(state: State) -> State:
    """The backbone of torchvision's ``deeplabv3_resnet101``."""
    kept = _without(state, r"(classifier|aux_classifier)\..*")
    return {k.removeprefix("backbone."): v for k, v in kept.items()}


def clip(state: State) -> State:
    """OpenAI's names to those of ``transformers.CLIPModel``; the latter pass.

    A residual network stays ``visual``. Projections are transposed, and the rows for queries, keys
    and values are taken apart.
    """
    unused = r"logit_scale|input_resolution|context_length|vocab_size|(.*\.)?attn_mask"
    kept = _without(state, rf"{unused}|(text|vision)_model\.embeddings\.position_ids")
    if {"visual.proj", "visual.conv1.weight"} <= kept.keys():  # a ResNet's stem is conv1 too
        kept["vision_model.embeddings.patch_embedding.weight"] = kept.pop("visual.conv1.weight")
    found: State = {}
    for name, tensor in kept.items():
        if name in ("text_projection", "visual.proj"):
            found["text_projection.weight" if name[0] == "t" else "visual_projection.weight"] = (
                tensor.T.contiguous()
            )
        elif match := re.fullmatch(r"(.*resblocks\.\d+\.)attn\.in_proj_(weight|bias)", name):
            stem = _renamed(match[1], _CLIP)
            for part, rows in zip("qkv", tensor.chunk(3), strict=False):
                found[f"{stem}self_attn.{part}_proj.{match[2]}"] = rows
        else:
            found[_renamed(name, _CLIP)] = tensor
    return found


_BERT = (
    (r"LayerNorm\.gamma$", "LayerNorm.weight"),
    (r"LayerNorm\.beta$", "LayerNorm.bias"),
)
_MSCAN = ((r"mlp\.dwconv\.(weight|bias)$", r"mlp.dwconv.dwconv.\1"),)
_CLIP = (
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"(layers\.\d+\.)attn\.out_proj\.", r"\1self_attn.out_proj."),
    (r"(layers\.\d+\.)ln_([12])\.", r"\1layer_norm\2."),
    (r"(layers\.\d+\.)mlp\.c_fc\.", r"\1mlp.fc1."),
    (r"(layers\.\d+\.)mlp\.c_proj\.", r"\1mlp.fc2."),
)


def under(prefix: str, state: State) -> State:
    """The same with a prefix before every name."""
    return {prefix + k: v for k, v in state.items()}


def _with_bert(state: State) -> State:
    mark = "text_encoder."
    inner = {k.removeprefix(mark): v for k, v in state.items() if k.startswith(mark)}
    return {k: v for k, v in state.items() if not k.startswith(mark)} | under(mark, bert(inner))


def _without(state: State, dropped: str) -> State:
    return {k: v for k, v in state.items() if not re.fullmatch(dropped, k)}


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
