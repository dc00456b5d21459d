import math

import torch

from cytoray.mil.folding import fold_query, unfold_values


def test_folded_attention_equals_keys_and_values_written_out():
    tokens, query = torch.randn(9, 12), torch.randn(2, 12)
    key_weight, value_weight, bias = torch.randn(12, 12), torch.randn(12, 12), torch.randn(12)
    asked = fold_query(query, key_weight, heads=3)
    weights = (asked @ tokens.T).softmax(-1)
    answer = unfold_values(weights @ tokens, value_weight)
    keys, values = tokens @ key_weight.T + bias, tokens @ value_weight.T
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        plain = (query[:, part] @ keys[:, part].T / math.sqrt(4)).softmax(-1)
        assert torch.allclose(weights[:, head], plain, atol=1e-5)
        assert torch.allclose(answer[:, part], plain @ values[:, part], atol=1e-4)
