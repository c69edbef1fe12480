"""Write a cache of prompt embeddings, so that training never loads the text encoder.

    python -m tools.encode_prompts --prompts prompts.jsonl held_out.jsonl \
        --encoder Wan2.1-T2V-1.3B --output embeddings.safetensors

`--videos` embeds what training videos are told in: a folder, a manifest or shards (docs/data.md).
Texts that the cache holds already are left alone; a call that was interrupted goes on where it
stopped. The encoder is loaded only if a text is missing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_kvpo import log
from megatron_kvpo.data.embeddings import DTYPES, EmbeddingCache, add_texts, missing_texts
from megatron_kvpo.data.prompts import load_prompts
from megatron_kvpo.data.sources import VideoSource, read_entries
from megatron_kvpo.model.umt5 import EncoderFiles, load_umt5

logger = log.get_logger("megatron_kvpo.tools.encode_prompts")


def main(arguments: Sequence[str] | None = None) -> int:
    """Embed every segment of the prompt files that the cache lacks. ValueError for bad input."""
    options = _parse(arguments)
    log.setup(True)
    texts = [text for file in options.prompts for p in load_prompts(file) for text in p.segments]
    for source in options.videos:
        entries = read_entries(VideoSource(path=source))
        texts += [part.text for entry in entries for part in entry.segments if part.text.strip()]
    texts += [""] if options.empty else []
    identity = EncoderFiles.find(options.encoder).identity()
    missing = missing_texts(options.output, texts, encoder=identity, dtype=options.dtype,
                            text_length=options.text_length)  # fmt: skip
    logger.info("%d texts, %d of them new", len(set(texts)), len(missing))
    if missing:
        encoder = load_umt5(options.encoder, text_length=options.text_length,
                            dtype=DTYPES[options.dtype], device=options.device,
                            strict=options.strict)  # fmt: skip
        with encoder.resident():
            add_texts(options.output, encoder, missing, batch=options.batch)
    cache = EmbeddingCache(options.output)
    size = options.output.stat().st_size
    logger.info("%s holds %d texts, %.1f MB", options.output, len(cache), size / 1e6)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.encode_prompts",
                                     description=(__doc__ or "").split("\n")[0])  # fmt: skip
    parser.add_argument("--prompts", type=Path, nargs="+", default=[], metavar="JSONL")
    parser.add_argument("--videos", type=Path, nargs="+", default=[], metavar="SOURCE")
    parser.add_argument("--empty", action="store_true",
                        help="the empty text too, for captions that are dropped")  # fmt: skip
    parser.add_argument("--encoder", type=Path, required=True, metavar="FOLDER",
                        help="Wan's own folder, its diffusers folder, or one of umT5")  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, metavar="SAFETENSORS")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--text-length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8, help="texts that are embedded at once")
    parser.add_argument("--strict", action="store_true",
                        help="refuse texts that are too long instead of cutting them")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.batch < 1:
        parser.error(f"--batch {options.batch} must be at least 1")
    if not (options.prompts or options.videos or options.empty):
        parser.error("nothing to embed: name --prompts files, --videos, or --empty")
    return options


if __name__ == "__main__":
    log.run_command(main, logger)
