"""Files become windows: what is read, how it is cut and drawn, what is refused."""

import gzip
import hashlib
import json

import pyarrow
import pytest
import torch
from pyarrow import ipc, parquet

from tests.unit.tiny_models import EOS_ID, character_tokenizer, random_text
from vllm_atomic_moe.calibration.documents import read_documents
from vllm_atomic_moe.calibration.text import (
    DataFile,
    draw_windows,
    parse_data,
    parse_files,
    take_shard,
)

TOKENIZER = character_tokenizer()


def encode(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def draw(path, *, seq_len=4, samples=100, seed=0, domain="d"):
    return draw_windows([DataFile(path, domain)], TOKENIZER, seq_len, samples, seed)


def write_jsonl(path, *documents):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def write_parquet(path, **columns):
    parquet.write_table(pyarrow.table(columns), path)
    return path


def write_arrow(path, stream=True, **columns):
    table = pyarrow.table(columns)
    make = ipc.new_stream if stream else ipc.new_file
    with make(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return path


@pytest.fixture
def letters(tmp_path):
    path = tmp_path / "letters.txt"
    path.write_text(random_text(400))
    return path


@pytest.mark.parametrize(
    ("name", "argument", "domain"),
    [
        ("wiki.txt", "wiki.txt", "wiki"),
        ("wiki.txt", "wiki.txt:english", "english"),
        ("a.test.txt", "a.test.txt", "a.test"),
        ("a:b.txt", "a:b.txt", "a:b"),
        ("a:b.txt", "a:b.txt:code", "code"),
        ("x.jsonl", "x.jsonl:c", "c"),
        ("x.parquet", "x.parquet", "x"),
    ],
)
def test_parse_data(name, argument, domain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).touch()
    [parsed] = parse_data(argument).files
    assert (str(parsed.path), parsed.domain) == (name, domain)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("missing.txt", "missing.txt does not exist"),
        ("missing.txt:code", "missing.txt does not exist"),
        ("there.txt:", "the domain after the colon is empty"),
        ("there.csv", "suffix '.csv' is not known; wanted .txt, .jsonl, .json, .parquet, .arrow"),
        ("folder", "folder is a directory without .txt"),
        ("folder:", "the domain after the colon is empty"),
        ("*.parquet:code", r"\*.parquet does not exist; wanted a file, a directory or a glob"),
        ("*.csv", "there.csv: suffix '.csv' is not known"),
        ("mixed", r"mixed is a directory with .json and .parquet files; .* 'mixed/\*.parquet'"),
        ("saved", "saved is a dataset with the splits train, test; name one, as in saved/train"),
        ("saved/test", "saved/test/a.arrow does not exist, and state.json lists it"),
        ("saved/train", "saved/train/state.json: lists no files"),
    ],
)
def test_parse_data_refuses(argument, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.txt").touch()
    (tmp_path / "there.csv").touch()
    for name in ("folder", "mixed", "saved/train", "saved/test"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("a.parquet", "dataset_infos.json", "README.md"):
        (tmp_path / "mixed" / name).touch()
    (tmp_path / "saved/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    (tmp_path / "saved/train/state.json").write_text('{"_data_files": [{"filename": "../x"}]}')
    (tmp_path / "saved/test/state.json").write_text('{"_data_files": [{"filename": "a.arrow"}]}')
    with pytest.raises(ValueError, match=message):
        parse_data(argument)


def test_the_three_kinds_of_file_give_the_same_windows(tmp_path):
    documents = ["hello there", "a", "general kenobi"]
    jsonl = write_jsonl(tmp_path / "x.jsonl", *documents)
    table = write_parquet(tmp_path / "x.parquet", text=documents, other=[1, 2, 3])
    joined = [*encode("hello there"), EOS_ID, *encode("a"), EOS_ID, *encode("general kenobi")]
    wanted = torch.tensor(joined[: len(joined) // 4 * 4]).view(-1, 4)

    for path in (jsonl, table):
        text = draw(path)
        assert torch.equal(text.windows["d"].long(), wanted)
        assert text.corpora[0].tokens == sum(map(len, documents))
        assert text.corpora[0].documents == 3


def test_a_txt_file_is_one_document_without_special_tokens(letters):
    text = draw(letters, seq_len=100)
    assert text.windows["d"].flatten().tolist() == encode(letters.read_text())
    assert text.num_windows == 4
    assert text.num_tokens == 400
    assert text.corpora[0].name == "letters.txt"
    assert text.corpora[0].sha256 == hashlib.sha256(letters.read_bytes()).hexdigest()


def test_empty_documents_and_null_rows_are_skipped(tmp_path):
    table = write_parquet(tmp_path / "x.parquet", text=["abcd", "", None, "ef"])
    jsonl = tmp_path / "x.jsonl"
    jsonl.write_text('{"text": "abcd"}\n\n{"text": ""}\nnull\n{"text": "ef"}\n')
    listed = tmp_path / "x.json"
    listed.write_text('[{"text": "abcd"}, null, {"text": null}, {"text": "ef"}]')
    arrow = write_arrow(tmp_path / "x.arrow", text=["abcd", "", None, "ef"])
    wanted = [*encode("abcd"), EOS_ID, *encode("ef")]
    for path in (table, jsonl, listed, arrow):
        text = draw(path, seq_len=7)
        assert text.windows["d"].flatten().tolist() == wanted
        assert text.warnings == [f"{path.name}: 2 records without text were skipped"]


def test_files_of_one_domain_are_joined_in_the_order_given(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 5)
    files = [DataFile(tmp_path / f"{name}.txt", "d") for name in "ba"]
    windows = draw_windows(files, TOKENIZER, 11, 1, 0).windows["d"]
    assert windows.flatten().tolist() == [*encode("bbbbb"), EOS_ID, *encode("aaaaa")]


def test_all_windows_in_order_when_there_are_no_more_than_samples(letters):
    everything = draw(letters, seq_len=10, samples=40).windows["d"]
    assert everything.flatten().tolist() == encode(letters.read_text())
    assert torch.equal(draw(letters, seq_len=10, samples=41).windows["d"], everything)


def test_windows_are_drawn_without_replacement_with_the_seed(letters):
    everything = [tuple(row) for row in draw(letters, seq_len=10).windows["d"].tolist()]
    drawn = [tuple(row) for row in draw(letters, seq_len=10, samples=39).windows["d"].tolist()]
    assert len(set(drawn)) == 39
    assert set(drawn) < set(everything)
    again = draw(letters, seq_len=10, samples=39).windows["d"]
    assert [tuple(row) for row in again.tolist()] == drawn
    other = draw(letters, seq_len=10, samples=39, seed=1).windows["d"]
    assert [tuple(row) for row in other.tolist()] != drawn


def test_samples_count_per_domain_and_a_draw_ignores_the_other_domains(letters, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(random_text(300, seed=1))
    files = [DataFile(other, "first"), DataFile(letters, "second")]
    text = draw_windows(files, TOKENIZER, 10, 7, 0)
    assert list(text.windows) == ["first", "second"]
    assert [len(windows) for windows in text.windows.values()] == [7, 7]
    alone = draw_windows(files[1:], TOKENIZER, 10, 7, 0)
    assert torch.equal(text.windows["second"], alone.windows["second"])


def test_too_little_text_is_refused_with_the_tokens_seen(letters):
    with pytest.raises(ValueError, match=r"'d': 400 tokens, one window takes 401; give more text"):
        draw(letters, seq_len=401)


def test_no_text_at_all_is_refused(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match="0 tokens"):
        draw(tmp_path / "empty.txt")


def test_documents_need_an_eos_to_join_them(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", "one", "two")
    files = [DataFile(path, "d")]
    with pytest.raises(ValueError, match=r"the model's tokenizer has no EOS token"):
        draw_windows(files, character_tokenizer(eos=None), 2, 1, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"text": "ok"}\n{"body": "x"}\n',
            "line 2 has no field `text`; its fields are body: name",
        ),
        ('{"text": 3}\n', "line 1: `text` is a int, wanted a string or a list of messages"),
        ('["text"]\n', "line 1 is a list, wanted an object with a text"),
        ('{"text": "ok"}\nnope\n', "line 2 is not JSON"),
    ],
)
def test_broken_jsonl_is_refused(content, message, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        list(read_documents(path))


def test_parquet_without_a_text_column_is_refused(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", body=["a"])
    with pytest.raises(
        ValueError, match=r"no column `text` of strings or messages among body \(string\)"
    ):
        list(read_documents(path))
    path = write_parquet(tmp_path / "y.parquet", text=[1])
    with pytest.raises(ValueError, match=r"among text \(int64\)"):
        list(read_documents(path))
    (tmp_path / "z.parquet").write_text("not parquet at all")
    with pytest.raises(ValueError, match="not a readable parquet file"):
        list(read_documents(tmp_path / "z.parquet"))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_text_that_is_not_utf8_is_refused(suffix, tmp_path):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(b"abc \xff\xfe")
    with pytest.raises(ValueError, match=r"not UTF-8 at byte 4"):
        list(read_documents(path))


TEXTS = ["hello there", "a", "général"]


def compressed(path, content):
    path.write_bytes(gzip.compress(content) if path.suffix.lower() == ".gz" else content)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((name, "list") for name in ("x.json", "x.JSON.GZ")),
        *((name, "lines") for name in ("x.json", "x.jsonl.gz", "X.JSONL")),
        *((name, "text") for name in ("x.txt.gz", "x.TXT")),
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["", "byte order mark"])
def test_text_and_json_in_every_form(name, content, mark, tmp_path):
    records = [{"text": text} for text in TEXTS]
    contents = {
        "list": json.dumps(records, indent=1),
        "lines": "\n".join(map(json.dumps, records)),
        "text": "".join(TEXTS),
    }
    path = compressed(tmp_path / name, (mark + contents[content]).encode())
    wanted = ["".join(TEXTS)] if content == "text" else TEXTS
    assert list(read_documents(path)) == wanted
    assert parse_data(str(path)).domain.lower() == "x"


def test_what_is_no_gzip_or_ends_early_is_refused(tmp_path):
    whole = gzip.compress(b'{"text": "abc"}\n' * 100)
    for content in (whole[:-9], b"abc", whole[:30] + b"\0" * 40):
        path = tmp_path / "x.jsonl.gz"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x.jsonl.gz: not a complete gzip file"):
            list(read_documents(path))


def test_a_lone_surrogate_becomes_the_replacement_character(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(r'{"text": "a\ud83d b\ud83d\ude00"}' + "\n")
    assert list(read_documents(path)) == ["a\ufffd b\U0001f600"]
    assert draw(path).num_windows


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.large_string(),
        pyarrow.string_view(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    ],
    ids=str,
)
def test_parquet_columns_of_every_kind_of_string(kind, tmp_path):
    column = pyarrow.array([*TEXTS, None]).cast(kind)
    path = write_parquet(tmp_path / "x.PARQUET", text=column)
    assert list(read_documents(path)) == [*TEXTS, None]


@pytest.mark.parametrize("stream", [True, False])
def test_arrow_streams_and_files(stream, tmp_path):
    path = write_arrow(tmp_path / "x.arrow", stream, n=[1, 2, 3], text=TEXTS)
    assert list(read_documents(path)) == TEXTS
    chats = pyarrow.array([MESSAGES], pyarrow.list_view(MESSAGE))
    chatty = character_tokenizer()
    chatty.chat_template = TEMPLATE
    path = write_arrow(tmp_path / "y.arrow", stream, messages=chats)
    assert list(read_documents(path, chatty)) == ["<user>hi<assistant>yes"]
    with pytest.raises(ValueError, match=r"no column `body` .* among n \(int64\), text \(string"):
        list(read_documents(tmp_path / "x.arrow", field="body"))
    for content in (b"", b"text", path.read_bytes()[:-40]):
        (tmp_path / "z.arrow").write_bytes(content)
        with pytest.raises(ValueError, match="not a readable arrow file"):
            list(read_documents(tmp_path / "z.arrow", chatty))


def save_to_disk(directory, *shards):
    """Save as the package datasets does."""
    directory.mkdir(parents=True)
    names = [f"data-{index:05}-of-{len(shards):05}.arrow" for index in range(len(shards))]
    for name, texts in zip(names, shards, strict=True):
        write_arrow(directory / name, text=pyarrow.array(texts, pyarrow.large_string()))
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    (directory / "state.json").write_text(json.dumps(state))
    (directory / "dataset_info.json").write_text("{}")


def test_directories_and_globs_are_their_files_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    # The last shard has no text at all: its column has no type.
    for name, texts in (("b", TEXTS[2:]), ("a", TEXTS[:2]), ("c", [None])):
        write_parquet(tmp_path / f"shards/{name}.parquet", text=texts)
    (tmp_path / "shards/.hidden.parquet").touch()
    (tmp_path / "shards/README.md").touch()
    save_to_disk(tmp_path / "saved/train", TEXTS[:1], [*TEXTS[1:], None])
    # What its users cached is not part of it.
    write_arrow(tmp_path / "saved/train/cache-0.arrow", text=["other"])
    (tmp_path / "saved/dataset_dict.json").write_text('{"splits": ["train"]}')
    write_jsonl(tmp_path / "all.jsonl", *TEXTS, None)
    found = {}
    for argument, count, domain in (
        ("all.jsonl", 1, "all"),
        ("shards", 3, "shards"),
        ("shards/", 3, "shards"),
        ("shards:c4", 3, "c4"),
        ("shards/*.parquet", 3, "shards"),
        ("shards/*.parquet:c4", 3, "c4"),
        ("**/*.parquet", 3, tmp_path.name),
        ("shards/[abc].parquet", 3, "shards"),
        ("saved", 2, "saved"),
        ("saved/train", 2, "train"),
    ):
        files = parse_files([argument])
        assert len(files) == count, argument
        assert files == sorted(files, key=lambda file: file.path)
        assert {file.domain for file in files} == {domain}
        renamed = [DataFile(file.path, "d") for file in files]
        found[argument] = draw_windows(renamed, TOKENIZER, 4, 100, 0)
        assert len(found[argument].warnings) == 1
    # The same windows, whatever files they came in.
    assert len({text.digests["d"] for text in found.values()}) == 1
    for arguments, message in (
        (["shards", "shards"], "is given twice"),
        (["shards:a", "shards/a.parquet"], "would both be domain 'a'"),
        (["shards:a", "shards/a.parquet:a"], "is given twice"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_files(arguments)


def test_the_digest_is_of_the_windows_of_the_whole_run(letters):
    text = draw(letters, seq_len=10, samples=20)
    assert draw(letters, seq_len=10, samples=20).digests == text.digests
    others = [draw(letters, seq_len=10, samples=20, seed=1), draw(letters, seq_len=10, samples=19)]
    others += [draw(letters, seq_len=20, samples=10), take_shard(text, 1, 2)]
    assert text.digests["d"] not in {other.digests["d"] for other in others}


MESSAGE = pyarrow.struct({"role": pyarrow.string(), "content": pyarrow.string()})
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def test_messages_go_through_the_chat_template(tmp_path):
    chatty = character_tokenizer()
    chatty.chat_template = TEMPLATE
    lines = write_jsonl(tmp_path / "x.jsonl")
    lines.write_text(json.dumps({"id": 1, "messages": MESSAGES}) + "\n")
    table = write_parquet(tmp_path / "x.parquet", messages=[MESSAGES], n=[1])
    for path in (lines, table):
        assert list(read_documents(path, chatty)) == ["<user>hi<assistant>yes"]
        with pytest.raises(ValueError, match="holds messages, and the model's tokenizer has no"):
            list(read_documents(path, TOKENIZER))
    chatty.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(ValueError, match=r"line 1, `messages`: .* template refuses it \(never\)"):
        list(read_documents(lines, chatty))


def test_a_field_may_be_named(tmp_path):
    lines = tmp_path / "x.jsonl"
    lines.write_text('{"text": "no", "body": "yes"}\n')
    table = write_parquet(tmp_path / "x.parquet", text=["no"], body=["yes"])
    for path in (lines, table):
        assert list(read_documents(path, field="body")) == ["yes"]
        with pytest.raises(ValueError, match=r"`other`.*text.*body.*name one with --field"):
            list(read_documents(path, field="other"))


def test_files_of_one_name_are_two_domains_or_named(tmp_path):
    for name in ("c4", "code"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").touch()
    one, two = (str(tmp_path / name / "train.jsonl") for name in ("c4", "code"))
    with pytest.raises(ValueError, match=r"would both be domain 'train'; name .*jsonl:c4"):
        parse_files([one, two])
    with pytest.raises(ValueError, match="would both be domain 'train'"):
        parse_files([one, f"{two}:train"])
    assert [file.domain for file in parse_files([one, f"{two}:code"])] == ["train", "code"]
    assert [file.domain for file in parse_files([f"{one}:d", f"{two}:d"])] == ["d", "d"]
    with pytest.raises(ValueError, match="is given twice"):
        parse_files([one, one])
