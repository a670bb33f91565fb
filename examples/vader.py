"""The VADER sentiment sentences (Hutto & Gilbert, ICWSM 2014): four domains, one binary task.

The texts belong to third parties, so no copy of them is in this repository: the first call fetches the source
distribution of the PyPI package vaderSentiment, which ships them, and keeps it in the user's cache directory.
"""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import NamedTuple

from packages import Archive, fetch


SDIST = Archive(
    package="vaderSentiment",
    version="3.3.2",
    filename="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
INNER_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
DOMAIN_FILES = {
    "amazon": "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt",
    "movies": "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    "nyt": "hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt",
    "tweets": "hutto_ICWSM_2014/tweets_GroundTruth.txt",
}
DOMAINS = tuple(DOMAIN_FILES)
NEUTRAL_BELOW = 0.8
"""Sentences with an absolute mean rating (scale -4 to 4) below this are neither positive nor negative."""


class Example(NamedTuple):
    """A sentence and its sentiment: 1 is positive, 0 is negative."""

    text: str
    label: int


def load_domain(domain: str, cache_dir: str | os.PathLike[str] | None = None) -> list[Example]:
    """Reads the clearly positive and clearly negative sentences of one domain, in the order of the file.

    A sentence that occurs again (ignoring case and spacing) is dropped, so that no test sentence can also be a
    training sentence.

    Args:
        domain: one of `DOMAINS`.
        cache_dir: where the archive is kept; default: `packages.default_cache_dir()`.

    Raises:
        ValueError: for an unknown domain.
        RuntimeError: if the archive is not in the cache and cannot be fetched.
    """
    if domain not in DOMAIN_FILES:
        raise ValueError(f"unknown domain {domain!r}: choose one of {', '.join(DOMAINS)}")
    archive = fetch(SDIST, cache_dir)
    examples, seen = [], set()
    for line in _read_domain_file(archive, domain).splitlines():
        _, rating, text = line.split("\t", 2)
        fingerprint = " ".join(text.lower().split())
        if abs(float(rating)) >= NEUTRAL_BELOW and fingerprint not in seen:
            seen.add(fingerprint)
            examples.append(Example(text.strip(), int(float(rating) > 0)))
    return examples


def _read_domain_file(archive: Path, domain: str) -> str:
    # Members are read by their exact names and in memory: nothing is ever written to a path that an archive names.
    with tarfile.open(archive) as outer, tarfile.open(fileobj=io.BytesIO(_member(outer, INNER_ARCHIVE))) as inner:
        return _member(inner, DOMAIN_FILES[domain]).decode("utf-8")


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise RuntimeError(f"{name} is not a file in {SDIST.filename}")
    return file.read()
