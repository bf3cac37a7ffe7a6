"""Parquet and Arrow files: the same documents, bad rows and resumption as lines, and damage told from system errors."""

import errno
import random

import pytest

pytest.importorskip("pyarrow", reason="pyarrow is not installed")

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_tf.data import columns, documents, parquet_files
from megatron_tf.data.documents import BadLines, Fields, Position, documents_of
from megatron_tf.data.indexed_dataset import DataError
from megatron_tf.data.sources import inputs_of, sources_of

TEXT = Fields(("text",))
FORMATS = ("parquet", "arrow", "stream")
"""Arrow has two formats under one ending: with a footer, and as a stream."""


def rows_of(count, seed=1):
    generator = random.Random(seed)
    sets = ("Books", "Pile-CC", None)
    return [
        {
            "id": i,
            "text": " ".join(
                generator.choices(["growth", "日本", "\x00", "x" * 300, ""], k=generator.choice([0, 1, 40]))
            ),
            "meta": {"pile_set_name": generator.choice(sets), "title": f"title {i}"},
        }
        for i in range(count)
    ]


def write_table(path, table, kind, batch=100, **options):
    """Write row groups, or record batches, of a number of rows."""
    table = table if isinstance(table, pa.Table) else pa.Table.from_pylist(table)
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=batch, **options)
        return path
    new = pa.ipc.new_file if kind == "arrow" else pa.ipc.new_stream
    with new(str(path), table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, batch)
    return path


def path_of(tmp_path, kind, name="a"):
    return tmp_path / f"{name}.{'parquet' if kind == 'parquet' else 'arrow'}"


def read(path, *keys):
    """The documents of a file, and its bad rows."""
    bad = BadLines()
    return list(documents_of(inputs_of([str(path)]), keys or ["text"], bad)), bad


def texts_of(path, key="text"):
    found, bad = read(path, key)
    return [document[key] for document in found], bad


@pytest.mark.parametrize("kind", FORMATS)
def test_the_rows_of_a_table_are_documents_with_their_sets(tmp_path, kind):
    rows = rows_of(1000)
    found, bad = read(write_table(path_of(tmp_path, kind), rows, kind))
    assert [document["text"] for document in found] == [row["text"] for row in rows]
    names = [document.get("meta", {}).get("pile_set_name") for document in found]
    assert names == [row["meta"]["pile_set_name"] for row in rows]
    assert (bad.lines, bad.counts) == (1000, {})


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("size", [1, 200_000, 1 << 28])
def test_the_sources_of_a_file_are_its_rows_in_order_however_it_is_divided(tmp_path, kind, size, monkeypatch):
    monkeypatch.setattr(columns, "SOURCE_BYTES", size)
    rows = rows_of(1000)
    path = write_table(path_of(tmp_path, kind), rows, kind)
    (sources,) = sources_of(inputs_of([str(path)]), TEXT)
    assert len(sources) == (1 if kind == "stream" else {1: 10, 1 << 28: 1}.get(size, len(sources)))
    assert kind == "stream" or size != 200_000 or 1 < len(sources) < 10
    assert sum(source.size for source in sources) == path.stat().st_size
    assert len({str(source.identity()) for source in sources}) == len(sources)
    found = [document["text"] for source in sources for batch in source.batches(TEXT) for document in batch.documents]
    assert found == [row["text"] for row in rows]
    assert [source.is_whole for source in sources] == [len(sources) == 1] * len(sources)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_source_resumes_at_every_batch(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(documents, "BATCH_BYTES", 2_000)
    rows = rows_of(300)
    for row in rows[::7]:
        row["text"] = None
    path = write_table(path_of(tmp_path, kind), rows, kind, batch=90)
    ((source,),) = sources_of(inputs_of([str(path)]), TEXT)
    batches = list(source.batches(TEXT))
    assert len(batches) > 20
    assert batches[-1].end_line == 300
    assert batches[-1].end_byte == path.stat().st_size if kind != "stream" else True
    for done in range(len(batches)):
        rest = list(source.batches(TEXT, Position(batches[done].end_line)))
        assert [each.documents for each in rest if each.documents] == [
            each.documents for each in batches[done + 1 :] if each.documents
        ]
        assert sum(each.bad.lines for each in rest) == sum(each.bad.lines for each in batches[done + 1 :])


@pytest.mark.parametrize("kind", FORMATS)
def test_bad_rows_are_counted_by_kind_with_the_place_of_the_first(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 4_000)
    values = [b"good", None, b"\xff", b"y" * 5_000, b"\xed\xa0\x80", None, b"end"]
    text = pa.array(values, pa.binary()).view(pa.string())
    path = write_table(path_of(tmp_path, kind), pa.table({"text": text}), kind, batch=2)
    texts, bad = texts_of(path)
    assert texts == ["good", "end"]
    assert bad.counts == {"'text' is not a text": 2, "invalid UTF-8": 2, "longer than 0 MiB": 1}
    assert list(bad.first.values()) == [f"{path}:2", f"{path}:3", f"{path}:4"]
    assert bad.bytes == {"'text' is not a text": 0, "invalid UTF-8": 4, "longer than 0 MiB": 5_000}
    assert bad.lines == 7


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    "of",
    [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())],
    ids=["string", "large", "dictionary"],
)
def test_text_of_every_type_is_read(tmp_path, kind, of):
    values = ["one", "", "日本", "one", None] * 30
    table = pa.table({"text": pa.array(values, pa.string()).cast(of)})
    texts, bad = texts_of(write_table(path_of(tmp_path, kind), table, kind))
    assert texts == [value for value in values if value is not None]
    assert bad.counts == {"'text' is not a text": 30}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_key_with_dots_is_a_column_of_that_name_or_leads_through_structs(tmp_path, kind):
    rows = [{"meta": {"text": f"nested {i}", "deep": {"text": f"deep {i}"}}} for i in range(5)]
    rows[3]["meta"] = None
    path = write_table(path_of(tmp_path, kind), rows, kind)
    for key in ("meta.text", "meta.deep.text"):
        texts, bad = texts_of(path, key)
        assert texts == [f"{'nested' if key == 'meta.text' else 'deep'} {i}" for i in (0, 1, 2, 4)]
        assert bad.counts == {f"'{key}' is not a text": 1}
    table = pa.Table.from_pylist(rows).append_column("meta.text", [["whole name"] * 5])
    assert texts_of(write_table(path_of(tmp_path, kind, "b"), table, kind), "meta.text")[0] == ["whole name"] * 5


COLUMNS = [
    ({"body": ["a"], "id": [1]}, "has no column 'text', but: body, id: give the column of its text"),
    ({"text": [5]}, "column 'text' is int64, not text"),
    ({"text": [b"bytes"]}, "column 'text' is binary, not text"),
    ({"text": [["a", "list"]]}, r"column 'text' is list<.*>, not text"),
    ({"text": [{"text": "a"}]}, r"column 'text' is struct<.*>, not text"),
    ({"text": pa.array([None])}, "column 'text' is null, not text"),
]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("table, message", COLUMNS)
def test_a_file_without_a_column_of_text_is_an_error_before_anything_is_read(tmp_path, kind, table, message):
    path = write_table(path_of(tmp_path, kind), pa.table(table), kind)
    with pytest.raises(DataError, match=message) as caught:
        sources_of(inputs_of([str(path)]), TEXT)
    assert str(path) in str(caught.value)


def test_all_files_that_cannot_be_used_are_named_at_once(tmp_path):
    for name in "abc":
        write_table(tmp_path / f"{name}.parquet", pa.table({"text" if name == "b" else "body": ["x"]}), "parquet")
    with pytest.raises(DataError, match=r"2 of 3 inputs can't be used:\n.*a\.parquet has no .*\n.*c\.parquet has no "):
        sources_of(inputs_of([str(tmp_path / "*.parquet")]), TEXT)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_table_without_rows_is_an_error(tmp_path, kind):
    path = write_table(path_of(tmp_path, kind), pa.table({"text": pa.array([], pa.string())}), kind)
    with pytest.raises(DataError, match=r"no document in .*: it is empty"):
        read(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"no document in .*: it is empty"):
        read(path)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_a_file_whose_footer_is_cut_off_is_an_error(tmp_path, kind, share):
    path = write_table(path_of(tmp_path, kind), rows_of(1000), kind)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match=r"a\.\w+ is damaged or truncated \(.*\): restore it"):
        read(path)


def test_a_stream_that_is_cut_keeps_its_whole_batches(tmp_path):
    path, rows = tmp_path / "a.arrow", rows_of(1000)
    write_table(path, rows, "stream")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    texts, bad = texts_of(path)
    assert texts == [row["text"] for row in rows[: len(texts)]]
    assert 300 < len(texts) < 700
    assert len(texts) % 100 == 0
    assert bad.counts == {"damaged record batch": 1}
    assert 0 < sum(bad.bytes.values()) < len(content) // 2


def incompressible(count):
    generator = random.Random(3)
    return [{"text": generator.randbytes(200).hex()} for _ in range(count)]


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place : place + 40] = bytes(byte ^ 0xFF for byte in content[place : place + 40])
    path.write_bytes(content)


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_rows_before_damage_in_a_row_group_and_all_other_row_groups_are_kept(tmp_path, compression, monkeypatch):
    """Pages of 50 rows, read 512 rows at a time; the damage is in the middle of the second row group."""
    monkeypatch.setattr(documents, "BATCH_BYTES", 210_000)
    path, rows = tmp_path / "a.parquet", incompressible(3000)
    pages = {"data_page_size": 20_000, "write_batch_size": 10, "use_dictionary": False, "write_page_checksum": True}
    write_table(path, rows, "parquet", batch=1000, compression=compression, **pages)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    flip(path, column.data_page_offset + column.total_compressed_size * 62 // 100)
    texts, bad = texts_of(path)
    kept = len(texts) - 2000
    expected = [row["text"] for row in rows]
    assert texts == expected[: 1000 + kept] + expected[2000:]
    assert 550 < kept < 620
    assert bad.counts == {"damaged row group": 1000 - kept}
    assert bad.first == {"damaged row group": f"{path}:{1000 + kept + 1}"}
    assert bad.lines == 3000
    assert 0 < bad.bytes["damaged row group"] < column.total_compressed_size
    ((source,),) = sources_of(inputs_of([str(path)]), TEXT)
    batches = list(source.batches(TEXT))
    for done in range(len(batches)):  # rows that are lost are counted once, wherever a command resumes
        rest = list(source.batches(TEXT, Position(batches[done].end_line)))
        assert sum(each.bad.lines for each in rest) == sum(each.bad.lines for each in batches[done + 1 :])


def test_a_damaged_record_batch_counts_as_a_row_and_the_others_are_kept(tmp_path):
    path, rows = tmp_path / "a.arrow", rows_of(1000)
    write_table(path, rows, "arrow", compression="zstd")
    flip(path, path.stat().st_size * 55 // 100)
    texts, bad = texts_of(path)
    expected = [row["text"] for row in rows]
    assert texts == expected[:500] + expected[600:]
    assert bad.counts == {"damaged record batch": 1}
    ((source,),) = sources_of(inputs_of([str(path)]), TEXT)
    assert not any(batch.bad.counts for batch in source.batches(TEXT, Position(501)))


@pytest.mark.parametrize("kind", ["arrow", "stream"])
def test_offsets_that_lead_out_of_a_record_batch_are_damage_and_no_crash(tmp_path, kind):
    offsets = pa.array([0, 3, 1_000_000_000, 9], pa.int32()).buffers()[1]
    text = pa.StringArray.from_buffers(3, offsets, pa.py_buffer(b"onetwoend"))
    path = path_of(tmp_path, kind)
    schema = pa.schema({"text": pa.string()})
    with (pa.ipc.new_file if kind == "arrow" else pa.ipc.new_stream)(str(path), schema) as writer:
        writer.write_batch(pa.record_batch([["good"]], schema=schema))
        writer.write_batch(pa.record_batch([text], schema=schema))
    texts, bad = texts_of(path)
    assert texts == ["good"]
    assert bad.counts == {"damaged record batch": 1}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_system_error_while_reading_is_never_damage(tmp_path, kind, monkeypatch):
    path = write_table(path_of(tmp_path, kind), rows_of(1000), kind)
    read_rows = columns.column_at

    def fail(rows, found):
        if rows.num_rows and fail.left == 0:
            raise OSError(errno.EIO, "Input/output error")
        fail.left -= 1
        return read_rows(rows, found)

    fail.left = 4
    monkeypatch.setattr(columns, "column_at", fail)
    with pytest.raises(DataError, match=r"can't be read \(.*Input/output error\): make it readable and run the same"):
        read(path)
    path.unlink()
    with pytest.raises(DataError, match="is missing"):
        list(source_of(path, kind).batches(TEXT))


def source_of(path, kind):
    if kind == "parquet":
        return parquet_files.RowGroups(path, first=0, stop=1, size=1, rows_before=0, is_whole=True)
    from megatron_tf.data.arrow_files import RecordBatches

    return RecordBatches(path, first=0, stop=None, size=1, is_whole=True)


def test_files_whose_ending_lies_are_refused_with_the_right_one(tmp_path):
    parquet = write_table(tmp_path / "right.parquet", rows_of(10), "parquet").read_bytes()
    stream = write_table(tmp_path / "right.arrow", rows_of(10), "stream").read_bytes()
    cases = [
        ("a.parquet", b'{"text": "a"}\n', "is not Parquet, as its name says: name it .jsonl"),
        ("a.arrow", parquet, "is Parquet, not Arrow as its name says: name it .parquet"),
        ("a.parquet", stream, "is Arrow, not Parquet as its name says: name it .arrow"),
        ("a.jsonl", parquet, "is Parquet, not JSON lines as its name says: name it .parquet"),
        ("a.jsonl", stream, "is Arrow, not JSON lines as its name says: name it .arrow"),
    ]
    for name, content, message in cases:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            read(tmp_path / name)


def test_rows_larger_than_a_batch_are_read_one_by_one(tmp_path, monkeypatch):
    """Dictionary encoding makes equal rows look small: 2,000 rows of 20 KB take 20 KB of the file."""
    monkeypatch.setattr(documents, "BATCH_BYTES", 10_000)
    path = write_table(tmp_path / "a.parquet", pa.table({"text": ["x" * 20_000] * 2000}), "parquet", batch=2000)
    lengths = []
    chunks = parquet_files._chunks_of_group
    monkeypatch.setattr(
        parquet_files, "_chunks_of_group", lambda *some: (lengths.append(c.rows.num_rows) or c for c in chunks(*some))
    )
    assert texts_of(path)[0] == ["x" * 20_000] * 2000
    assert max(lengths) <= 512
    write_table(path, pa.table({"text": [f"{i}" + "x" * 20_000 for i in range(50)]}), "parquet", use_dictionary=False)
    lengths.clear()
    assert len(texts_of(path)[0]) == 50
    assert lengths == [1] * 50


def test_a_row_group_is_never_held_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "BATCH_BYTES", 100_000)
    path = tmp_path / "a.parquet"
    pages = {"data_page_size": 50_000, "write_batch_size": 10, "use_dictionary": False}
    write_table(path, incompressible(30_000), "parquet", batch=30_000, **pages)
    ((source,),) = sources_of(inputs_of([str(path)]), TEXT)
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in source.batches(TEXT)]
    assert len(held) > 50
    assert max(held) < 3_000_000 < path.stat().st_size
