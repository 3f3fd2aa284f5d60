"""The adapter's arithmetic: from vLLM's placement of layers to regions, layouts and extents."""

from __future__ import annotations

import runpy
from dataclasses import dataclass, field

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvcached_plugins.engine_source import installed
from kvcached_plugins.vllm.geometry import Plan, extent_map, plan, regions
from kvcached_plugins.vllm.planning import block_outermost_first
from kvcached_vmm.errors import ContractError, EngineUnsupported
from kvcached_vmm.extents import EXTENT_BYTES, Region
from kvcached_vmm.units import GIB, KIB, MIB


@dataclass
class Tensor:
    """As vLLM's ``KVCacheTensor``: where layers of one shape lie."""

    layers: list[str]
    layer_stride: int
    block_stride: int
    offset: int = 0
    size: int = 0
    """Bytes of the whole buffer, as in vLLM: the same in every tensor."""


@dataclass
class Config:
    """As vLLM's ``KVCacheConfig``, as far as the adapter reads it."""

    num_blocks: int
    kv_cache_tensors: list[Tensor] = field(default_factory=list)


def block_outermost(num_blocks: int, *groups: list[tuple[int, int]]) -> Config:
    """A config whose blocks hold all layers; a group is (layers, page) for each shape in it."""
    block = max(sum(layers * page for layers, page in group) for group in groups)
    config = Config(num_blocks)
    for group in groups:
        offset = 0
        for layers, page in group:
            tensor = Tensor(["x"] * layers, page, block, offset, num_blocks * block)
            config.kv_cache_tensors.append(tensor)
            offset += layers * page
    return config


def layer_outermost(num_blocks: int, *groups: list[tuple[int, int]]) -> Config:
    """A config where each layer owns a run of blocks; groups start at byte 0, as in vLLM."""
    size = num_blocks * max(sum(layers * page for layers, page in group) for group in groups)
    config = Config(num_blocks)
    for group in groups:
        offset = 0
        for layers, page in group:
            stride = num_blocks * page
            config.kv_cache_tensors.append(Tensor(["x"] * layers, stride, page, offset, size))
            offset += layers * stride
    return config


def test_a_block_outermost_layout_is_one_region() -> None:
    assert regions(block_outermost(100, [(32, 64 * KIB)])) == [Region(0, 2 * MIB)]


def test_layers_of_several_shapes_share_a_block() -> None:
    config = block_outermost(100, [(30, 64 * KIB), (1, 4 * KIB), (3, 12 * KIB)])
    assert regions(config) == [Region(0, 30 * 64 * KIB + 40 * KIB)]


def test_a_layer_outermost_layout_has_one_region_per_layer() -> None:
    config = layer_outermost(10, [(3, 64 * KIB)])
    assert regions(config) == [Region(index * 640 * KIB, 64 * KIB) for index in range(3)]


def test_layers_of_several_shapes_have_regions_of_several_strides() -> None:
    config = layer_outermost(10, [(2, 64 * KIB), (1, 4 * KIB)])
    assert regions(config) == [
        Region(0, 64 * KIB),
        Region(640 * KIB, 64 * KIB),
        Region(1280 * KIB, 4 * KIB),
    ]


def test_the_only_layer_is_one_region_whatever_the_layout() -> None:
    assert regions(block_outermost(10, [(1, 64 * KIB)])) == [Region(0, 64 * KIB)]
    assert regions(layer_outermost(10, [(1, 64 * KIB)])) == [Region(0, 64 * KIB)]


@pytest.mark.parametrize("layout", [block_outermost, layer_outermost])
def test_groups_that_overlay_each_other_are_counted_once(layout: object) -> None:
    assert callable(layout)
    page = 64 * KIB
    assert regions(layout(10, [(2, page)], [(2, page)])) == regions(layout(10, [(2, page)]))
    assert regions(layout(10, [(3, page)], [(2, page)])) == regions(layout(10, [(3, page)]))


def test_a_single_block_is_not_mistaken_for_another_layout() -> None:
    assert regions(layer_outermost(1, [(2, 64 * KIB)])) == [
        Region(0, 64 * KIB),
        Region(64 * KIB, 64 * KIB),
    ]


@pytest.mark.parametrize("layer_stride", [64 * KIB, 96 * KIB, 639 * KIB])
def test_layers_between_the_blocks_of_others_are_refused(layer_stride: int) -> None:
    config = Config(10, [Tensor(["a", "b"], layer_stride, 64 * KIB)])
    with pytest.raises(EngineUnsupported, match="cannot follow"):
        regions(config)


def test_layers_that_do_not_fit_in_a_block_are_refused() -> None:
    config = Config(10, [Tensor(["a", "b", "c"], 32 * KIB, 64 * KIB)])
    with pytest.raises(EngineUnsupported):
        regions(config)


def test_a_layout_with_heads_outside_of_blocks_is_refused() -> None:
    """LHBNC: a block of a layer is one run of bytes per head."""
    heads, page, num_blocks = 4, 64 * KIB, 10
    layer = heads * num_blocks * page
    config = Config(num_blocks, [Tensor(["a", "b"], layer, page, 0, 2 * layer)])
    with pytest.raises(EngineUnsupported):
        regions(config)


layouts = st.sampled_from([block_outermost, layer_outermost])
shapes = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 100 * KIB)), min_size=1, max_size=3)


@given(layouts, st.integers(1, 500), shapes, st.integers(1, 64 * MIB))
def test_every_byte_of_a_block_is_in_one_region(
    layout: object, num_blocks: int, shape: list[tuple[int, int]], extent: int
) -> None:
    """With strides of any size, odd ones too."""
    assert callable(layout)
    if layout is layer_outermost:  # a layer that lies before the first block of another has ended
        pages = [page for _, page in shape]
        assume(num_blocks * min(pages) >= max(pages))
    config = layout(num_blocks, shape)
    block_bytes = sum(layers * page for layers, page in shape)
    chosen = plan([config], 4 * KIB, GIB, extent)
    extents = extent_map(config, chosen, 4 * KIB)  # which refuses regions that overlap
    assert extents.block_bytes == block_bytes
    assert num_blocks * block_bytes <= extents.size_bytes < num_blocks * block_bytes + 4 * KIB


@pytest.mark.parametrize(
    ("names", "best"),
    [
        (["LBNHC", "BLNHC", "BLHNC"], "BLNHC"),
        (["LBHNC", "BLNHC", "BLHNC"], "BLHNC"),
        (["LBHNC", "BLNHC"], "BLNHC"),
        (["BLHNC", "LBNHC"], "BLHNC"),
        (["LBNHC", "LBHNC"], "LBNHC"),
        (["LHBNC", "LBHNC"], "LHBNC"),
    ],
)
def test_the_block_outermost_layout_is_moved_to_the_front(names: list[str], best: str) -> None:
    ordered = block_outermost_first(names)
    assert ordered[0] == best
    assert [name for name in ordered if name != best] == [name for name in names if name != best]


@given(st.lists(st.text("LBNHC", min_size=1), min_size=1, unique=True))
def test_no_layout_is_added_or_lost(names: list[str]) -> None:
    assert sorted(block_outermost_first(names)) == sorted(names)


def test_layouts_are_those_of_vllm() -> None:
    try:
        root, _ = installed("vllm")
    except ContractError as error:
        pytest.skip(str(error))
    # The file needs nothing else of vLLM, whose import takes half a minute.
    layouts = runpy.run_path(str(root / "vllm" / "v1" / "kv_cache_layout.py"))["KVCacheLayout"]
    names = [layout.name for layout in layouts]
    for name in ("LBNHC", "LBHNC"):
        first = block_outermost_first([name, *(other for other in names if other != name)])[0]
        assert layouts[first].is_block_outermost


BLOCK = [(32, 64 * KIB)]  # 2 MiB


def test_extents_have_the_usual_size_unless_the_limit_is_small() -> None:
    config = block_outermost(10_000, BLOCK)
    assert plan([config], 2 * MIB, 100 * GIB, None) == Plan(EXTENT_BYTES // (2 * MIB))
    assert plan([config], 2 * MIB, 512 * MIB, None) == Plan(4)
    assert plan([config], 2 * MIB, 64 * MIB, None) == Plan(1)


def test_an_extent_is_never_less_than_a_granule() -> None:
    small = block_outermost(10_000, [(1, 64 * KIB)])
    for limit, extent in ((MIB, None), (GIB, 1)):
        assert plan([small], 2 * MIB, limit, extent) == Plan(32)
    layers = layer_outermost(10_000, [(4, 64 * KIB)])
    assert plan([layers], 2 * MIB, GIB, 1) == Plan(32)


def test_the_user_has_the_last_word() -> None:
    config = block_outermost(10_000, BLOCK)
    assert plan([config], 2 * MIB, 64 * MIB, 8 * MIB) == Plan(4)
    assert plan([config], 2 * MIB, 100 * GIB, 8 * MIB) == Plan(4)


@given(st.integers(2 * MIB, 16 * GIB), st.integers(2 * MIB, 16 * GIB))
def test_a_smaller_budget_never_gets_larger_extents(one: int, other: int) -> None:
    config = block_outermost(10_000, BLOCK)
    smaller, larger = sorted((one, other))
    assert (
        plan([config], 2 * MIB, smaller, None).blocks_per_extent
        <= plan([config], 2 * MIB, larger, None).blocks_per_extent
    )


def test_workers_agree_on_the_blocks_of_an_extent() -> None:
    """Ranks may hold layers of other sizes, and every one must fill a granule."""
    wide, narrow = block_outermost(100, BLOCK), block_outermost(100, [(2, 48 * KIB)])
    chosen = plan([wide, narrow], 2 * MIB, GIB, 2 * MIB)
    assert chosen == plan([narrow, wide], 2 * MIB, GIB, 2 * MIB)
    maps = [extent_map(config, chosen, 2 * MIB) for config in (wide, narrow)]
    assert len({extents.num_extents for extents in maps}) == 1
    assert [extents.blocks(0) for extents in maps] == [range(chosen.blocks_per_extent)] * 2
