"""The command-line parsers of the engines, with our plug-ins loaded."""

from __future__ import annotations

import argparse
import functools

import pytest


@functools.cache
def vllm_parser() -> argparse.ArgumentParser:
    pytest.importorskip("vllm", reason="vLLM is not installed: its commands were not parsed")
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    load_general_plugins()
    parser = FlexibleArgumentParser()
    return ServeSubcommand().subparser_init(parser.add_subparsers())


@functools.cache
def sglang_parser() -> argparse.ArgumentParser:
    pytest.importorskip("sglang", reason="SGLang is not installed: its commands were not parsed")
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    load_plugins()
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return parser


def parse(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    """Without abbreviations, which argparse would take for the flag.

    Raises:
        SystemExit: the parser refuses a word; it says which on the standard error.
    """
    for word in words:
        name = word.partition("=")[0]
        if name.startswith("--") and name not in parser._option_string_actions:
            parser.error(f"unrecognized arguments: {word}")
    return parser.parse_args(words)
