"""Options of a gateway: keys, what is open to others, and which do not go together."""

from __future__ import annotations

import pytest

from turbofit.cli.commands.gateway import gateway as command
from turbofit.cli.options.field_options import filled
from turbofit.core.errors import UsageError
from turbofit.gateway.config import GatewayConfig, GatewayOptions
from turbofit.gateway.options import check_bind, configured


def parsed(*words: str, **more: object) -> GatewayConfig:
    with command.make_context("gateway", ["--plan", "p", "--upstream", "http://x", *words]) as ctx:
        return configured(filled(GatewayOptions, ctx.params), **more)


def test_options(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("TURBOFIT_API_KEYS", "a, b,")
    options = parsed()
    assert (options.api_key, options.host, options.port) == (("a", "b"), "127.0.0.1", 23333)
    options = parsed("--api-key", "x", "--host", "::", upstream_key="u")
    assert (options.api_key, options.upstream_key) == (("x",), "u")
    options = parsed("--trusted-proxies", "10.0.0.7", "fd00::/8")
    assert options.trusted_proxies == ("10.0.0.7", "fd00::/8")
    monkeypatch.delenv("TURBOFIT_API_KEYS")
    file = tmp_path / "keys"
    file.write_text("one\n\ntwo\n")
    options = parsed("--api-key-file", str(file), "--api-key", "x")
    assert options.api_key == ("x", "one", "two")
    options = parsed("--host", "0.0.0.0", "--front-key-file", str(file))
    assert (options.api_key, options.front_keys) == ((), ("one", "two"))
    for words, says in (
        (("--ssl-certfile", "x"), "go together"), (("--api-key", " "), "empty"),
        (("--trusted-proxies", "proxy"), "is no address or network"),
        (("--host", "0.0.0.0"), "no key is set"),
        (("--api-key-file", str(tmp_path / "nobody")), "cannot be read"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=says):
            parsed(*words)


@pytest.mark.parametrize("bad", ["k" * 20_000, "k" * 16_361, "a\nb", "a\0b"])
def test_a_key_that_no_header_can_carry_is_refused(bad: str, tmp_path, monkeypatch) -> None:
    with pytest.raises(UsageError, match="no client could send"):
        parsed("--api-key", bad)
    assert parsed("--api-key", "k" * 16_360).api_key
    file = tmp_path / "keys"
    file.write_text("k" * 20_000)
    for option in ("--api-key-file", "--front-key-file"):
        with pytest.raises(UsageError, match="no client could send"):
            parsed(option, str(file))
    monkeypatch.setenv("TURBOFIT_API_KEYS", f"a,{'k' * 20_000}")
    with pytest.raises(UsageError, match="a key of 20,000 characters"):
        parsed()


@pytest.mark.parametrize("front", [("--nodes", "http://x"), ("--cluster", "ray")])
def test_a_front_has_no_options_of_its_nodes(front, tmp_path) -> None:
    (tmp_path / "key").write_text("key\n")
    words = [*front, "--host", "0.0.0.0", "--front-key-file", str(tmp_path / "key")]
    with pytest.raises(UsageError) as caught:
        command.main(words, standalone_mode=False)
    assert caught.value.options == ("front_key_file",)


def test_a_bound_of_all_requests_is_for_one_model_alone() -> None:
    words = ["--models", "a=http://x", "--max-concurrent-requests", "2"]
    with pytest.raises(UsageError) as caught:
        command.main(words, standalone_mode=False)
    assert caught.value.options == ("max_concurrent_requests",)


def test_a_bind_beyond_loopback_needs_a_key_or_a_word() -> None:
    for host in ("0.0.0.0", "::"):
        with pytest.raises(UsageError, match="no key is set"):
            check_bind(GatewayConfig(host=host))
    check_bind(GatewayConfig(host="0.0.0.0", no_auth=True))
    check_bind(GatewayConfig(host="0.0.0.0", api_key=("k",)))
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        check_bind(GatewayConfig(host=host))
