"""Packed rows against padded ones: the plan, the layout, and the numbers of every architecture."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from config.errors import UserError
from tests.test_batching import PAD, make_store
from tests.tiny_models import PACKABLE, VOCABULARY, exact_norms, tiny_model
from trainers.data.batching import BatchLoader
from trainers.data.cutters import PackedCutter, build_cutter
from trainers.data.layout import PackedLayout, visible
from trainers.data.packing import (
    RowSizes,
    balanced_shares,
    best_fit,
    collate_packed,
    input_lengths,
    longest_sequence,
    num_positions,
    num_target_tokens,
    num_tokens,
    pack_rows,
)
from trainers.data.prefixes import shared_prefixes
from trainers.data.token_store import TokenStore, TokenStoreWriter
from trainers.distributed.parallelize import find_blocks
from trainers.kernels import attention, flash_attention
from trainers.kernels.attention import PACKED, PackedMask, block_mask, packed_states, use_packed_attention
from trainers.kernels.cpu_attention import attend_by_pieces, pieces_of
from trainers.kernels.logps import sequence_logps
from trainers.kernels.self_check import check_packed_attention, packed_and_alone
from trainers.kernels.shortcuts import use_needed_positions

# Prompt, chosen, rejected: some longer than Mistral's window of 6, some of one token, which is a target and no input.
PAIRS = [(4, 3, 5), (9, 1, 1), (1, 12, 2), (3, 1, 8), (7, 6, 1)]


# Tokens that the prompts of these rows begin with: two families, with a row between that begins as no other does.
SHARED = [(20, 0), (17, 1), (20, 0), (0, 2), (17, 1)]


def store_of(folder, shapes, seed=0, *, shared=()) -> TokenStore:
    """Rows of random tokens with these lengths; before the prompt, so many tokens of so numbered a sequence."""
    generator = torch.Generator().manual_seed(seed)
    beginnings = torch.randint(3, VOCABULARY, (3, 32), generator=generator).tolist()
    with TokenStoreWriter(folder, key=f"{shapes} {seed} {shared}", num_segments=len(shapes[0])) as writer:
        for i, shape in enumerate(shapes):
            row = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in shape]
            if shared:
                length, family = shared[i]
                row[0] = beginnings[family][:length] + row[0]
            writer.append(f"row-{i}", row)
        writer.finish({})
    return TokenStore(folder)


def microbatch(store, *, packing, max_tokens=None):
    """All rows of a store, in its order."""
    cutter = build_cutter(packing=packing, device=torch.device("cpu"), pad_token_id=PAD, max_tokens=max_tokens)
    (batch,) = BatchLoader(store, cutter, batch_size=len(store)).batches()
    (one,) = batch.microbatches
    return one


def in_order(batch, values):
    """Per-row values of a micro-batch in the order of the store."""
    return values[batch["row"].argsort()]


def exact_model(name="llama", *, dtype=torch.float64):
    model = tiny_model(name, dtype=dtype)
    return exact_norms(model) if dtype == torch.float64 else model


def packed_model(name="llama", *, dtype=torch.float64, shortcut=True):
    model = exact_model(name, dtype=dtype)
    use_packed_attention(model)
    if shortcut:
        use_needed_positions(find_blocks(model, None)[-1])
    check_packed_attention(*packed_and_alone(model, device=torch.device("cpu")), name=name)
    return model


def logps_and_gradients(model, batch):
    """Log-probabilities, and the gradients of a weighted sum of them by name."""
    logps, num_targets = sequence_logps(model, batch)
    logps, num_targets = in_order(batch, logps), in_order(batch, num_targets)
    weights = torch.linspace(-1, 2, logps.numel(), dtype=torch.float64).view(logps.shape)
    model.zero_grad()
    (logps * weights).sum().backward()
    return (
        logps.detach(),
        num_targets,
        {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad},
    )


@pytest.mark.parametrize("shared", [(), SHARED])
@pytest.mark.parametrize("segments", [3, 2])
@pytest.mark.parametrize("name", PACKABLE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_log_probabilities_and_gradients_equal_the_padded_ones(tmp_path, name, dtype, segments, shared):
    store = store_of(tmp_path / "store", [shape[:segments] for shape in PAIRS], shared=shared)
    padded, packed = microbatch(store, packing=False), microbatch(store, packing=True)
    expected, expected_counts, truth = logps_and_gradients(exact_model(name, dtype=dtype), padded)
    logps, counts, gradients = logps_and_gradients(packed_model(name, dtype=dtype), packed)
    assert torch.equal(counts, expected_counts)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(logps, expected, rtol=tolerance, atol=tolerance)
    for key, gradient in gradients.items():
        scale = truth[key].abs().max().item()
        torch.testing.assert_close(gradient, truth[key], rtol=tolerance, atol=tolerance * scale, msg=key)


def difference(name, model, batch, expected):
    return (sequence_logps(model, batch)[0] - expected).abs().max().item()


@pytest.mark.parametrize("name", PACKABLE)
def test_wrong_masks_and_wrong_positions_are_nats_away(tmp_path, name):
    """The negative controls: the comparison above would see responses that see each other, or that stand later."""
    store = store_of(tmp_path / "store", PAIRS)
    model, packed = packed_model(name), microbatch(store, packing=True)
    expected, _ = sequence_logps(model, packed)
    plain = packed.clone()
    one_row = torch.tensor([[len(packed["input_ids"]), 0, 0]])
    plain["layout"] = PackedLayout(one_row)  # plain causal attention over all rows
    later = packed.clone()
    later["position_ids"] = torch.arange(len(packed["input_ids"]))
    assert difference(name, model, plain, expected) > 0.1
    store = store_of(tmp_path / "shared", PAIRS, shared=SHARED)
    shared = microbatch(store, packing=True)
    swapped = shared.clone()
    layout = shared["layout"]
    assert layout.prefix_rows.tolist() == [0, 0, 2, 2, 4]
    # A row of the second family sees the first one's prefix.
    swapped["layout"] = PackedLayout(layout.lengths[:, 1:], layout.lengths[:, 0], torch.tensor([0, 0, 2, 0, 4]))
    moved = (sequence_logps(model, swapped)[0] - sequence_logps(model, shared)[0]).abs().amax(1)
    assert (moved > 1e-2).tolist() == [False, False, False, True, False]
    if name != "gpt2":  # its 64 positions are fewer than the micro-batch's
        assert difference(name, model, later, expected) > 1e-3


def test_a_window_that_is_ignored_is_seen(tmp_path):
    """Mistral's window of 6: without it, the longer rows have other log-probabilities, and only they."""
    store = store_of(tmp_path / "store", PAIRS)
    batch = microbatch(store, packing=True)
    expected, _ = sequence_logps(packed_model("mistral"), batch)
    model = exact_model("mistral")
    model.config.sliding_window = None
    use_packed_attention(model)
    moved = in_order(batch, (sequence_logps(model, batch)[0] - expected).abs() > 1e-3)
    inputs = input_lengths(store.lengths.long())
    assert moved.tolist() == ((inputs[:, :1] + inputs[:, 1:]) > 6).tolist()


def test_the_example_of_the_docstring(tmp_path):
    with TokenStoreWriter(tmp_path / "store", key="x", num_segments=3) as writer:
        writer.append("row", [[5, 6], [7, 8, 2], [9, 2]])
        writer.finish({})
    batch = collate_packed(TokenStore(tmp_path / "store"), torch.tensor([0]), {"score": torch.tensor([0.5])})
    assert batch["layout"].lengths.tolist() == [[0, 2, 2, 1]]
    assert {name: value.tolist() for name, value in batch.exclude("layout").items()} == {
        "input_ids": [5, 6, 7, 8, 9],
        "position_ids": [0, 1, 2, 3, 2],
        "sources": [1, 2, 3, 1, 4],
        "needed": [1, 2, 3, 4],
        "targets": [7, 8, 2, 9, 2],
        "num_targets": [[3, 2]],
        "num_given": [[0, 0]],
        "score": [0.5],
        "row": [0],
    }


def test_empty_prompts_and_responses(tmp_path):
    """Without a prompt nothing predicts a response's first token; an empty response has log-probability 0."""
    shapes = [(0, 3, 2), (2, 0, 3), (0, 1, 1), (3, 2, 2)]
    store = store_of(tmp_path / "store", shapes)
    expected, counts, truth = logps_and_gradients(exact_model(), microbatch(store, packing=False))
    logps, packed_counts, gradients = logps_and_gradients(packed_model(), microbatch(store, packing=True))
    torch.testing.assert_close(logps, expected, rtol=1e-10, atol=1e-10)
    assert packed_counts.tolist() == counts.tolist() == [[2, 1], [0, 3], [0, 0], [2, 2]]
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, truth[key], rtol=1e-10, atol=1e-10 * truth[key].abs().max().item())


@pytest.mark.parametrize("segments", [2, 3])
def test_what_is_counted_is_the_same_packed_and_padded(tmp_path, segments):
    store = store_of(tmp_path / "store", [shape[:segments] for shape in PAIRS])
    padded, packed = microbatch(store, packing=False), microbatch(store, packing=True)
    assert int(num_tokens(packed)) == int(num_tokens(padded))
    assert int(num_target_tokens(packed)) == int(num_target_tokens(padded))
    assert longest_sequence(packed) == longest_sequence(padded)
    assert num_positions(packed) == int(input_lengths(store.lengths).sum()) < num_positions(padded)


sizes_lists = st.lists(st.integers(1, 60), min_size=1, max_size=40)
rows_with_families = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 4)), min_size=1, max_size=40)


@settings(max_examples=200)
@given(rows_with_families, st.integers(1, 150), st.integers(1, 6))
def test_bins_hold_every_row_once_within_the_limit(rows, limit, at_least):
    """Family 0 is of rows that share nothing; the others have prefixes of 10, 20, ... positions."""
    families = [family if family else -i for i, (_, family) in enumerate(rows, 1)]
    sizes = RowSizes([own for own, _ in rows], [10 * family for _, family in rows], families)
    bins = pack_rows(sizes, limit=limit, at_least=at_least)
    assert sorted(i for part in bins for i in part) == list(range(len(rows)))
    for part in bins:
        prefixes = sum(10 * family for family in {rows[i][1] for i in part})
        assert sizes.positions(part) == sum(rows[i][0] for i in part) + prefixes
        assert len(part) == 1 or sizes.positions(part) <= limit
    assert len(bins) >= min(at_least, len(rows))


@settings(max_examples=60)
@given(sizes_lists, st.integers(1, 100))
def test_a_best_fit_leaves_no_two_bins_that_could_be_one(sizes, limit):
    """What the guarantee of any-fit rests on; evening out makes no more micro-batches than it."""
    fullest = best_fit(sizes, limit)
    fills = sorted(sum(sizes[i] for i in part) for part in fullest)
    assert len(fills) < 2 or fills[0] + fills[1] > min(limit, fills[0] + fills[1] - 1)
    alone = RowSizes(sizes, [0] * len(sizes), list(range(len(sizes))))
    assert len(pack_rows(alone, limit=limit, at_least=1)) == len(fullest)


def test_rows_of_a_family_go_together_and_micro_batches_are_of_like_size():
    family = RowSizes([10] * 12, [30] * 12, [0] * 12)
    bins = pack_rows(family, limit=100, at_least=1)
    assert [family.positions(part) for part in bins] == [90, 90]  # not 100 and 80
    two = RowSizes([10] * 12, [30] * 12, [0, 1] * 6)
    bins = pack_rows(two, limit=100, at_least=1)
    assert sorted(sorted({i % 2 for i in part}) for part in bins) == [[0], [1]]
    assert sorted(two.positions(part) for part in bins) == [90, 90]


def test_prefixes_are_what_prompts_have_in_common(tmp_path):
    """Against a comparison token by token; 16 tokens are the least, and a prompt's last one is its own."""
    tokens = list(range(3, 60))
    prompts = [
        [*tokens[:20], 1, 2], [*tokens[:15], 2, 2], [*tokens[:23], 5], [9, 9], tokens[:20], [7, *tokens[:40]], [],
        [7, *tokens[:40]],
    ]  # fmt: skip
    with TokenStoreWriter(tmp_path / "store", key="x", num_segments=2) as writer:
        for i, prompt in enumerate(prompts):
            writer.append(f"row-{i}", [prompt, [4, 2]])
        writer.finish({})
    store = TokenStore(tmp_path / "store")
    families, lengths = shared_prefixes(store, torch.arange(8))
    assert families.tolist() == [0, 1, 0, 3, 0, 5, 6, 5]
    assert lengths.tolist() == [19, 0, 19, 0, 19, 40, 0, 40]
    chosen = store.select(torch.tensor([7, 2, 1, 0]))  # the fourth is left alone, and so is the second
    assert shared_prefixes(chosen, torch.arange(4)).lengths.tolist() == [0, 20, 0, 20]
    part = shared_prefixes(store, torch.arange(8)).select(torch.tensor([5, 4, 2, 1]))
    assert (part.families.tolist(), part.lengths.tolist()) == ([0, 1, 1, 3], [0, 19, 19, 0])


@settings(max_examples=60)
@given(sizes_lists, st.integers(1, 8))
def test_shares_differ_by_at_most_one_row_in_positions(sizes, world_size):
    shares = balanced_shares(sizes, world_size)
    assert sorted(i for part in shares for i in part) == list(range(len(sizes)))
    fills = [sum(sizes[i] for i in part) for part in shares]
    assert max(fills) - min(fills) <= max(sizes)


@pytest.mark.parametrize("world_size", [1, 2, 3, 16])
def test_ranks_share_the_packed_batches_of_one_process(tmp_path, world_size):
    store = make_store(tmp_path, 23)

    def batches(rank, world_size):
        return list(
            BatchLoader(
                store, PackedCutter(40), batch_size=10, seed=3, num_epochs=2, rank=rank, world_size=world_size
            ).batches()
        )  # fmt: skip

    shares = [batches(rank, world_size) for rank in range(world_size)]
    for k, alone in enumerate(batches(0, 1)):
        parts = [share[k] for share in shares]
        assert all(part.rows.tolist() == alone.rows.tolist() for part in parts)
        rows = [row for part in parts for micro in part.microbatches for row in micro["row"].tolist()]
        assert sorted(rows) == sorted(alone.rows.tolist())
        passes = {len(part.microbatches) + len(part.fillers) for part in parts}
        assert len(passes) == 1  # every rank makes as many
        assert all(
            len(micro["row"]) == 1 or num_positions(micro) <= 40 for part in parts for micro in part.microbatches
        )


def mask_of(layout, window) -> PackedMask:
    """What the kernels of a GPU get, on a CPU."""
    return PackedMask(
        attention._flex, torch.float32, None, layout.num_positions, window,
        blocks=block_mask(layout, window, torch.device("cpu")), seen=layout.seen_keys(),
    )  # fmt: skip


@pytest.mark.parametrize("last", [(30, 60, 70), (3, 6, 7)])
@pytest.mark.parametrize("prefixes", [None, ([6, 0, 0, 5], [0, 0, 2, 3]), ([6, 4, 0, 0], [0, 1, 0, 1])])
@pytest.mark.parametrize("window", [None, 3])
def test_block_masks_are_the_dense_ones(window, prefixes, last):
    """What flex_attention gets on a GPU, against a mask written pair by pair; its eager form gives the same output."""
    shapes = [(4, 3, 5), (2, 0, 7), (1, 6, 0), last]
    before, holders = prefixes or ([0] * 4, [0, 1, 2, 3])
    total = sum(map(sum, shapes)) + sum(before)
    dense = torch.zeros(total, total, dtype=torch.bool)
    start, shared = 0, {}
    for row, (prompt, chosen, rejected) in enumerate(shapes):
        shared[row] = range(start, start + before[row])
        start += before[row]
        for first, length in ((start + prompt, chosen), (start + prompt + chosen, rejected)):
            places = [*shared[holders[row]], *range(start, start + prompt), *range(first, first + length)]
            for i, query in enumerate(places):
                for j, key in enumerate(places[: i + 1]):
                    dense[query, key] = window is None or i - j < window
        start += prompt + chosen + rejected
    tensors = () if prefixes is None else (torch.tensor(before), torch.tensor(holders))
    layout = PackedLayout(torch.tensor(shapes), *tensors)
    place = torch.arange(total)
    assert torch.equal(visible(tuple(layout.table), place[:, None], place, window), dense)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, total, 16, generator=generator)
    key, value = (torch.randn(1, 2, total, 16, generator=generator) for _ in range(2))
    with torch.no_grad():
        flex = attention._flex(query, key, value, mask_of(layout, window), 0.2)
    rows = attend_by_pieces(query, key, value, pieces_of(layout, window, query.dtype), 0.2)
    repeated = [x.repeat_interleave(2, dim=1) for x in (key, value)]
    scores = (query @ repeated[0].transpose(2, 3) * 0.2).masked_fill(~dense, -torch.inf)
    expected = (scores.softmax(-1) @ repeated[1]).transpose(1, 2)
    torch.testing.assert_close(flex, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-5)


def documented_varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """What torch's documentation says of `varlen_attn`, sequence by sequence: (T, H, D) and starts -> (T, H, D)."""
    left, right = window_size
    assert right == 0
    assert enable_gqa
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    # Larger ones would start work for positions that are not there.
    assert (max_q, max_k) == (cu_seq_q.diff().max(), cu_seq_k.diff().max())
    parts = []
    for queries, keys in zip(itertools.pairwise(cu_seq_q.tolist()), itertools.pairwise(cu_seq_k.tolist()), strict=True):
        q = query[slice(*queries)].transpose(0, 1)
        k, v = (x[slice(*keys)].transpose(0, 1).repeat_interleave(2, 0) for x in (key, value))
        distance = torch.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None] - torch.arange(k.shape[1])
        hidden = (distance < 0) | ((distance > left) if left >= 0 else torch.zeros(()).bool())
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(hidden, -torch.inf)
        parts.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(parts)


NO_PREFIX = (None, None)
PREFIXES = [
    (torch.tensor(before), torch.tensor(holders))
    for before, holders in (([6, 0, 0, 5], [0, 0, 2, 3]), ([6, 4, 0, 0], [0, 1, 0, 1]))
]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("prefixes", [NO_PREFIX, *PREFIXES])
@pytest.mark.parametrize("shapes", [[(4, 3), (2, 0), (1, 6), (30, 60)], [(4, 3, 5), (2, 0, 7), (1, 6, 0), (30, 60, 7)]])
@pytest.mark.parametrize("window", [None, 3])
def test_flash_attention_gets_the_sequences_of_the_rows(monkeypatch, window, shapes, prefixes, compiled):
    """What a GPU would be asked for, output and gradients, against the kernel of the CPU."""
    monkeypatch.setattr(flash_attention, "varlen_attn", documented_varlen_attn)
    monkeypatch.setattr(flash_attention, "GROUPED", {"enable_gqa": True})  # of torch 2.13, whichever runs here
    layout = PackedLayout(torch.tensor(shapes), *prefixes)
    assert (layout.seen_keys().places is None) == (prefixes is NO_PREFIX and len(shapes[0]) == 2)
    generator = torch.Generator().manual_seed(0)
    states = [
        torch.randn(1, heads, layout.num_positions, 16, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2)
    ]
    mask = replace(mask_of(layout, window), dtype=torch.float64)
    flash = torch.compile(attention._flash, backend="aot_eager") if compiled else attention._flash
    results = []
    for output in (
        flash(*states, mask, 0.2),
        attend_by_pieces(*states, pieces_of(layout, window, torch.float64), 0.2),
    ):
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        results.append([output.detach(), *(state.grad for state in states)])
        for state in states:
            state.grad = None
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_compiled_block_is_compiled_for_all_sizes(monkeypatch):
    """Once for the first sizes, once for any: past torch's limit of recompilations a block would run uncompiled."""
    model = packed_model("llama", shortcut=False)
    monkeypatch.setattr(flash_attention, "varlen_attn", lambda q, k, v, *starts, **keywords: q + k.sum() + v.sum())
    monkeypatch.setattr(attention, "kernel_for", lambda device, dtype: attention._flash)
    monkeypatch.setattr(attention, "_to_device", lambda tensor, device: tensor)
    compilations = CompileCounterWithBackend("aot_eager")
    for block in model.model.layers:
        block.compile(backend=compilations)
    generator = torch.Generator().manual_seed(0)
    for num_rows in (3, 8, 5, 6, 4):
        shapes = torch.randint(2, 9, (num_rows, 3), generator=generator)
        before = torch.tensor([5] + [0] * (num_rows - 1))
        layout = PackedLayout(shapes, before, torch.zeros_like(before))
        ids = torch.arange(layout.num_positions) % 32
        packed_states(model, {"input_ids": ids, "position_ids": ids, "layout": layout}).sum().backward()
    assert compilations.frame_count == 2


def test_the_kernel_is_chosen_by_device_and_dtype():
    half, full = torch.bfloat16, torch.float32
    assert attention.kernel_for("cpu", half) is attention.kernel_for("cpu", full) is attention._by_pieces
    assert attention.kernel_for("cuda", half) is attention._flash
    assert attention.kernel_for("cuda", full) is attention._flex  # float32 has no flash kernel


@pytest.mark.parametrize("name", PACKABLE)
def test_the_last_mlp_runs_on_the_needed_positions_alone(tmp_path, name):
    """Other positions get none of it, and their states are not the model's; ordinary passes are."""
    batch = microbatch(store_of(tmp_path / "store", PAIRS), packing=True)
    model, plain = packed_model(name), packed_model(name, shortcut=False)
    sizes = []
    blocks = find_blocks(model, None)
    for block in blocks:
        block.mlp.register_forward_hook(lambda module, arguments, output: sizes.append(arguments[0].shape[1]))
    needed = batch["needed"]
    states, expected = packed_states(model, batch), packed_states(plain, batch)
    assert sizes == [num_positions(batch)] * (len(blocks) - 1) + [len(needed)]
    torch.testing.assert_close(states[needed], expected[needed], rtol=1e-12, atol=1e-12)
    differs = ~torch.isclose(states, expected).all(dim=1)
    assert differs.nonzero().squeeze(1).tolist() == sorted({*range(num_positions(batch))} - {*needed.tolist()})
    ids = batch["input_ids"][None, :9]
    assert torch.equal(model(ids).logits, plain(ids).logits)


def test_the_attention_of_a_model_is_asserted(tmp_path):
    batch = microbatch(store_of(tmp_path / "store", PAIRS), packing=True)
    with pytest.raises(AssertionError, match="use_packed_attention was not called"):
        sequence_logps(tiny_model(), batch)
    model = tiny_model()
    model.set_attn_implementation("eager")
    with pytest.raises(UserError, match="attn_implementation=eager needs packing=false"):
        use_packed_attention(model)


def test_a_model_that_ignores_its_positions_is_refused():
    model = tiny_model()
    use_packed_attention(model)
    forward = model.base_model.forward
    model.base_model.forward = lambda position_ids=None, **rest: forward(**rest)
    with pytest.raises(UserError, match=r"Llama computes other states for packed rows.*packing=false"):
        check_packed_attention(*packed_and_alone(model, device=torch.device("cpu")), name="Llama")


def test_a_model_that_cannot_read_the_mask_is_refused(monkeypatch):
    """A model that cuts a mask to the length of its keys, as some do."""
    model = tiny_model()
    use_packed_attention(model)
    forward = model.base_model.layers[0].forward

    def cutting(states, attention_mask=None, **rest):
        return forward(states, attention_mask=attention_mask and attention_mask[:, :, :9], **rest)

    monkeypatch.setattr(model.base_model.layers[0], "forward", cutting)
    with pytest.raises(UserError, match=r"cannot run on packed rows: write packing=false \(TypeError"):
        packed_and_alone(model, device=torch.device("cpu"))


def test_the_check_of_a_model_has_several_blocks_and_the_precision_of_the_run(monkeypatch):
    seen = []

    def spy(now, window, dtype, packed_mask=attention.packed_mask):
        seen.append(packed_mask(now, window, dtype))
        return seen[-1]

    monkeypatch.setattr(attention, "packed_mask", spy)
    model = packed_model(dtype=torch.float32)
    assert max(mask.num_positions for mask in seen) > 256
    assert {mask.dtype for mask in seen} == {torch.float32}
    seen.clear()
    bfloat16 = torch.bfloat16
    packed, alone = packed_and_alone(model, device=torch.device("cpu"), autocast=bfloat16)
    assert {mask.dtype for mask in seen} == {bfloat16}
    assert not torch.equal(packed, packed_and_alone(model, device=torch.device("cpu"))[0])
    check_packed_attention(packed, alone, name="Llama", autocast=bfloat16)


def test_ordinary_passes_of_a_packed_model_are_those_of_sdpa():
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0] * 4 + [1] * 5, [1] * 9])
    model, packed = tiny_model("mistral"), packed_model("mistral", dtype=torch.float32)
    assert packed.config._attn_implementation == PACKED
    assert torch.equal(packed(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)
    arguments = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(packed.generate(ids, **arguments), model.generate(ids, **arguments))


def test_activation_checkpointing_runs_the_same_attention_again(tmp_path):
    batch = microbatch(store_of(tmp_path / "store", PAIRS), packing=True)
    _, _, truth = logps_and_gradients(packed_model(), batch)
    model = packed_model().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _, _, gradients = logps_and_gradients(model, batch)
    assert all(torch.equal(gradients[name], truth[name]) for name in truth)


def test_autocast_stays_within_its_documented_error(tmp_path):
    """bfloat16 keeps 8 bits: half a percent of a gradient, a few hundredths of a nat a token; and it is used."""
    batch = microbatch(store_of(tmp_path / "store", PAIRS), packing=True)
    model = packed_model(dtype=torch.float32)
    exact, counts = sequence_logps(model, batch)
    rounded, _ = sequence_logps(model, batch, autocast=torch.bfloat16)
    assert rounded.dtype == torch.float64
    error = ((rounded - exact).abs() / counts).max().item()
    assert 1e-5 < error < 0.1
    assert not torch.is_autocast_enabled("cpu")
