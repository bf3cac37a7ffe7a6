"""Checkpoints that a stranger changed, with checksums that hold."""

import json
import os

import xxhash

from megatron_tf.checkpoint.format import MANIFEST, METADATA

FILE = "model-pp00-tp00-dp00.safetensors"


def change_manifest(directory, change):
    """Let `change` change the manifest's body, and write it with its checksum."""
    body = json.loads((directory / MANIFEST).read_text())
    body.pop("xxh3_128")
    change(body)
    body["xxh3_128"] = xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())
    (directory / MANIFEST).write_text(json.dumps(body))


def replace_file(directory, name, content):
    """Put other content in a file and let the manifest agree."""
    (directory / name).write_bytes(content)
    entry = {"bytes": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}
    change_manifest(directory, lambda body: body["files"].update({name: entry}))


def change_metadata(directory, change):
    """Let `change` change the metadata, and the manifest agree."""
    metadata = json.loads((directory / METADATA).read_text())
    change(metadata)
    replace_file(directory, METADATA, json.dumps(metadata).encode())


def make_fifo(path):
    """A FIFO in the place of the file."""
    path.unlink()
    os.mkfifo(path)


def embedding(body):
    """What the manifest says of the embedding."""
    return body["groups"]["model"]["embedding.weight"]
