import sys
from types import ModuleType, SimpleNamespace

import pytest

from ht_export.tensorrt import products
from ht_export.tensorrt.products import Product, find_product, parse_capability
from runtime.errors import InputError


def named(version: str, **content: object) -> ModuleType:
    module = ModuleType("some")
    module.__version__ = version  # type: ignore[attr-defined]
    for name, value in content.items():
        setattr(module, name, value)
    return module


@pytest.mark.parametrize("text", ["8.6", "86", "sm_86", "SM86", " 8.6 "])
def test_a_compute_capability_is_written_in_many_ways(text: str) -> None:
    assert parse_capability(text) == (8, 6)


def test_two_digits_before_the_point() -> None:
    assert parse_capability("12.0") == parse_capability("120") == (12, 0)


@pytest.mark.parametrize("text", ["", "eight", "8", "8.66.1"])
def test_what_is_no_compute_capability(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a compute capability such as 8\.6"):
        parse_capability(text)


def test_nothing_installed_names_both_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"not installed; install one of: .*\[tensorrt\].*; .*\[tensorrt-rtx\]"):
        find_product()
    with pytest.raises(InputError, match=r"install one of: pip install 'hidden-transfer\[tensorrt-rtx\]'"):
        find_product("tensorrt-rtx")


def test_an_unknown_product() -> None:
    with pytest.raises(InputError, match="--runtime onnx: must be one of tensorrt, tensorrt-rtx"):
        find_product("onnx")


def test_an_old_version_and_a_broken_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products.importlib.util, "find_spec", lambda name: name == "tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", named("10.13.3"))
    with pytest.raises(InputError, match=r"tensorrt 10\.13\.3 is too old, at least 10\.16 is needed"):
        find_product()
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(InputError, match="tensorrt is installed but cannot be imported"):
        find_product("tensorrt")


def test_tensorrt_builds_for_the_machines_own_gpu_only() -> None:
    flags = SimpleNamespace(STRONGLY_TYPED=1)
    product = Product("tensorrt", named("10.16.1", NetworkDefinitionCreationFlag=flags), "10.16.1")
    assert product.network_flags() == 2
    assert product.check_capabilities(()) == ()
    with pytest.raises(InputError, match="tensorrt builds for the GPU of this machine only"):
        product.check_capabilities([(8, 6)])


def test_tensorrt_for_rtx_builds_for_what_it_names() -> None:
    pytest.importorskip("tensorrt_rtx")
    product = find_product("tensorrt-rtx")
    assert product.check_capabilities(()) == ((8, 0), (8, 6), (8, 9), (12, 0))
    assert product.check_capabilities([(8, 9), (8, 9)]) == ((8, 9),)
    with pytest.raises(InputError, match=r"--compute-capability 7\.0: tensorrt-rtx .* builds for 7\.5, 8\.0"):
        product.check_capabilities([(7, 0)])
