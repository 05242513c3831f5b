"""What goes between processes arrives as it was, and in parts that fit together."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dni_fx.graphs.nested import flatten
from dni_fx.parallel.mailbox import Address, Letter
from dni_fx.parallel.placement import Places, join, place_stages
from dni_fx.parallel.serialization import ALIGNMENT, pack, unpack

from ..helpers.comparing import same_bits

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
]
LAYOUTS = ["plain", "transposed", "strided", "expanded", "slice", "channels_last", "flipped"]


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 5), max_size=5))
    dtype, layout = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(LAYOUTS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    tensor = (torch.randn(shape, generator=generator) * 100).to(dtype)
    if layout == "transposed" and tensor.dim() > 1:
        tensor = tensor.transpose(0, -1)
    elif layout == "strided" and tensor.dim():
        tensor = tensor[::2]
    elif layout == "expanded":
        tensor = tensor[None].expand(draw(st.integers(1, 40)), *tensor.shape)
    elif layout == "slice" and tensor.dim():
        tensor = tensor[..., 1:2]
    elif layout == "channels_last" and tensor.dim() == 4:
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    elif layout == "flipped" and dtype == torch.complex64:
        tensor = tensor.conj()
    return tensor.requires_grad_(tensor.is_floating_point() and draw(st.booleans()))


CONSTANTS = st.none() | st.integers() | st.text(max_size=5) | st.floats(allow_nan=False)
NESTED = st.recursive(
    tensors() | CONSTANTS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=3), inner)
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(NESTED)
def test_letters_arrive_as_they_were(value: Any) -> None:
    buffer = pack(value)
    assert buffer.dtype == torch.uint8
    assert buffer.numel() % ALIGNMENT == 0
    longer = torch.cat(
        [buffer, torch.full((1000,), 255, dtype=torch.uint8)]
    )  # a posted receive may be longer
    for arrived in (unpack(buffer), unpack(longer)):
        left, structure = flatten(value)
        right, other = flatten(arrived)
        assert structure == other
        for a, b in zip(left, right, strict=True):
            assert same_bits(b, a.detach().resolve_conj())
            assert not b.requires_grad
            if a.numel() > 1 and not any(s == 0 for s in a.stride()) and a.is_contiguous():
                assert b.stride() == a.stride()


def test_letters_keep_the_order_of_memory_and_share_none() -> None:
    image = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    wide, row = torch.randn(6, 1).expand(6, 1000), torch.randn(100, 100)[:, 3]
    back = unpack(pack({"image": image, "wide": wide, "row": row}))
    assert back["image"].is_contiguous(memory_format=torch.channels_last)
    assert pack(wide).numel() < 1000
    assert pack(row).numel() < 2000
    for name, tensor in {"image": image, "wide": wide, "row": row}.items():
        assert torch.equal(back[name], tensor)
        assert back[name].untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()
    before = image.clone()
    image.zero_()
    assert torch.equal(back["image"], before)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_rows_are_divided_and_put_together(data: st.DataObject) -> None:
    """Whoever sends and takes: each taker gets its own rows, once, in order."""
    groups = [
        data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=5, unique=True))
        for _ in range(2)
    ]
    size = data.draw(st.integers(max(map(len, groups)), 12))
    places = Places(tuple(map(tuple, groups)), {7: size})
    whole = torch.arange(size * 2.0).view(size, 2)
    arrived: dict[int, dict[int, Any]] = {}
    for rank in groups[0]:
        first, end = places.rows(0, rank, size)
        letter = Letter(7, {"v": whole[first:end], "n": None})
        for taker, part, payload in places.divide(0, 1, rank, letter):
            assert part.place not in arrived.setdefault(taker, {})
            arrived[taker][part.place] = (part, payload)
    assert arrived.keys() == set(groups[1])
    for taker, parts in arrived.items():
        assert {p.total for p, _ in parts.values()} == {len(parts)}
        first, end = places.rows(1, taker, size)
        found = join([parts[place] for place in sorted(parts)], add=True)
        assert torch.equal(found["v"], whole[first:end])
        assert found["n"] is None


def test_by_default_every_rank_has_as_many_stages() -> None:
    names = [f"stage_{k}" for k in range(7)]
    assert place_stages(None, names, 3).ranks == ((0,), (0,), (0,), (1,), (1,), (2,), (2,))
    assert place_stages(dict.fromkeys(names, 0), names, 1).ranks == ((0,),) * 7
    assert place_stages([0, [1, 0], 1, 1, 0, 0, (0, 1)], names, 2).divided == [1, 6]


def test_addresses_and_letters_travel() -> None:
    letter = (tuple(Address("value", 1, 2)), 3, (0, 1, 0), {"h": torch.ones(2)})
    address, step, part, payload = unpack(pack(letter))
    assert Address(*address) == Address("value", 1, 2)
    assert (step, part) == (3, (0, 1, 0))
    assert torch.equal(payload["h"], torch.ones(2))
