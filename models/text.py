"""BERT as a text encoder, through transformers, in a form that exports to few nodes.

Devlin et al., "BERT: pre-training of deep bidirectional transformers", NAACL 2019. The module names
are those of ``transformers.BertModel`` without its pooler, which is also how SLViT and LAVT store
their text encoder.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import BertConfig, BertModel

MASKED = -1e4  # added to the scores of padding; finite, and softmax makes it an exact zero


@dataclass(frozen=True)
class TextConfig:
    """Size of a BERT text encoder; the defaults are BERT-base, uncased."""

    vocabulary: int = 30522
    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072
    positions: int = 512


def bert(config: TextConfig) -> BertModel:
    """A BERT without pooler and without dropout, randomly initialised."""
    return BertModel(
        BertConfig(
            vocab_size=config.vocabulary,
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=config.hidden,
            max_position_embeddings=config.positions,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            attn_implementation="eager",
        ),
        add_pooling_layer=False,
    )


def encode(encoder: BertModel, ids: Tensor, words: Tensor) -> Tensor:
    """Contextual word vectors.

    ids:     [B, T] int32 or int64 token ids.
    words:   [B, T] bool, false for padding.
    returns: [B, T, width] float32; rows of padding hold values nobody may use.

    Embeddings and encoder are called one by one, with positions and segments of batch size 1, so
    that the exported graph has no shape arithmetic.
    """
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    embedded = encoder.embeddings(
        input_ids=ids, position_ids=positions, token_type_ids=torch.zeros_like(positions)
    )
    bias = torch.where(words[:, None, None, :], 0.0, MASKED)
    encoded: Tensor = encoder.encoder(embedded, attention_mask=bias).last_hidden_state
    return encoded
