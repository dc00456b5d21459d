import numpy as np
import torch

from cytoray.mil.tiles import embed_tiles, spread_indices, turn_and_flip

from .test_train_lora import TinyEncoder, make_slides


def test_embedding_in_batches_equals_one_forward():
    source, ids, _ = make_slides(1)
    encoder, indices = TinyEncoder().eval(), np.arange(5)
    with torch.no_grad():
        whole = encoder(torch.from_numpy(source.tiles[ids[0]][:5]))
    parts = embed_tiles(encoder, source, ids[0], indices, batch_tiles=2, precision="fp32")
    assert torch.allclose(whole, parts, atol=1e-5)


def test_turns_and_flips_are_the_eight_symmetries():
    tile = torch.arange(48, dtype=torch.uint8).reshape(1, 4, 4, 3)
    turned = turn_and_flip(tile.expand(200, -1, -1, -1), np.random.default_rng(0))
    distinct = {tuple(t.flatten().tolist()) for t in turned}
    symmetries = {
        tuple(torch.rot90(side, k, (0, 1)).flatten().tolist())
        for side in (tile[0], tile[0].flip(1))
        for k in range(4)
    }
    assert distinct == symmetries


def test_spread_indices_cover_the_bag():
    assert spread_indices(3, 10).tolist() == [0, 1, 2]
    spread = spread_indices(1000, 10)
    assert (spread[0], spread[-1], len(set(spread.tolist()))) == (0, 999, 10)
