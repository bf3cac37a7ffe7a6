"""Modifies checkpoints and updates their checksums, as an attacker could."""

import json
import os

import xxhash

from megatron_tf.checkpoint.format import MANIFEST, METADATA

FILE = "model-pp00-tp00-dp00.safetensors"


def change_manifest(directory, change):
    """Apply `change` to the manifest's body, and write it with a matching checksum."""
    body = json.loads((directory / MANIFEST).read_text())
    body.pop("xxh3_128")
    change(body)
    body["xxh3_128"] = xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())
    (directory / MANIFEST).write_text(json.dumps(body))


def replace_file(directory, name, content):
    """Replace the contents of a file, and update the manifest."""
    (directory / name).write_bytes(content)
    entry = {"bytes": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}
    change_manifest(directory, lambda body: body["files"].update({name: entry}))


def change_metadata(directory, change):
    """Apply `change` to the metadata, and update the manifest."""
    metadata = json.loads((directory / METADATA).read_text())
    change(metadata)
    replace_file(directory, METADATA, json.dumps(metadata).encode())


def make_fifo(path):
    """Replace the file with a FIFO."""
    path.unlink()
    os.mkfifo(path)


def embedding(body):
    """Return the manifest's entry of the embedding."""
    return body["groups"]["model"]["embedding.weight"]
