"""engines/backends/flags.py: every option that a message names, or a manifest keeps, is one of the command line's."""

from __future__ import annotations

import typer.main

import cli
from engines.backends.flags import OPTIONS, BuildFlags
from engines.backends.tensorrt import TensorRT
from engines.backends.tensorrt_rtx import TensorRTRTX


def test_every_option_is_one_that_build_and_run_have() -> None:
    for name in ("build", "run"):
        command = typer.main.get_command(cli.app).commands[name]  # type: ignore[attr-defined]
        assert set(OPTIONS.values()) <= {option for parameter in command.params for option in parameter.opts}


def test_what_is_recorded_is_what_the_command_takes() -> None:
    flags = BuildFlags(optimization_level=4, workspace_bytes=1_500_000_000, timing_cache="none")
    assert flags.recorded() == {"optimization_level": 4, "workspace": 1.5, "timing_cache": "none"}
    assert flags.asked() == ["--optimization-level", "--workspace", "--timing-cache"]
    assert BuildFlags().recorded() == {}


def test_what_is_on_where_it_suits_is_turned_off_by_its_name() -> None:
    off = BuildFlags(decode_gemv=False)
    assert (off.asked(), off.recorded()) == (["--no-decode-gemv"], {"no_decode_gemv": True})
    assert BuildFlags(decode_gemv=True).recorded() == {"decode_gemv": True}
    assert TensorRTRTX().lacks(off) == TensorRT().lacks(off) == []
