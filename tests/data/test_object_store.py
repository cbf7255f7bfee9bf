import pickle
import time

import numpy as np
import pytest
from moto.s3.models import s3_backends
from object_store_samples import BUCKET, Fault

from blip_pipelines.data import storage
from blip_pipelines.data.object_requests import ObjectMissingError, ObjectStoreError
from blip_pipelines.data.object_store import ObjectStore, split_url
from blip_pipelines.data.storage import StorageError

PART = 64 * 1024
SMALL = {"part_bytes": PART, "connections": 4}


def content(size, seed=0):
    return np.random.Generator(np.random.Philox(seed)).bytes(size)


def test_a_listing_goes_on_over_pages(server, tmp_path):
    keys = [f"many/{number:04d}" for number in range(1005)]  # a page holds 1000
    for key in keys:
        s3_backends["123456789012"]["aws"].put_object(BUCKET, key, b"x")  # past the wire, which would take a minute
    found = list(ObjectStore(server.config(tmp_path)).listing(f"s3://{BUCKET}/many/"))
    assert [entry.key for entry in found] == keys and {entry.size for entry in found} == {1}


@pytest.mark.parametrize("size", [0, 1, PART, 5 * PART + 17])
def test_an_object_is_fetched_whole_in_parallel_parts(proxy, tmp_path, size):
    url = proxy.server.put(f"whole/{size}", content(size))
    proxy.store(tmp_path, **SMALL).download(url, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == content(size)
    assert proxy.count("GET") == -(-size // PART)
    assert proxy.store(tmp_path).read(url) == content(size)


def test_a_part_of_an_object_is_read_alone(proxy, tmp_path):
    url = proxy.server.put("ranged", content(1000))
    assert proxy.store(tmp_path).read(url, 100, 50) == content(1000)[100:150]
    assert proxy.requests == [("GET", f"/{BUCKET}/ranged", "bytes=100-149")]


SURVIVED = {
    "errors": [Fault("status", 3)],
    "slow-downs": [Fault("status", 3, status=503, code="SlowDown")],
    "broken connections": [Fault("reset", 2)],
    "truncated bodies": [Fault("truncated", 3)],
    "wrong bytes": [Fault("wrong_bytes", 1)],
    "a trickle": [Fault("trickle", 1)],
    "credentials renewed meanwhile": [Fault("status", 1, status=400, code="ExpiredToken")],
    "one after the other": [Fault("status", 1), Fault("truncated", 1), Fault("reset", 1), Fault("wrong_bytes", 1)],
}


@pytest.mark.parametrize("name", SURVIVED)
def test_passing_faults_are_survived(proxy, tmp_path, name):
    url = proxy.server.put("faulty", content(5 * PART))
    proxy.faults = [Fault(**vars(fault)) for fault in SURVIVED[name]]
    proxy.store(tmp_path, timeout_seconds=0.5, **SMALL).download(url, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == content(5 * PART)
    assert not proxy.faults  # all of them happened
    proxy.faults = [Fault(**vars(fault)) for fault in SURVIVED[name]]
    assert proxy.store(tmp_path, timeout_seconds=0.5).read(url) == content(5 * PART)
    assert not proxy.faults


LASTING = {
    "errors": (Fault("status", None), "the store answers 500 InternalError, in the last of 3 attempts"),
    "slow-downs": (Fault("status", None, status=503, code="SlowDown"), "503 SlowDown, in the last of 3 attempts"),
    "broken connections": (Fault("reset", None), "no answer"),
    "truncated bodies": (Fault("truncated", None), "broke off after 32768 of 65536 bytes"),
    "wrong bytes": (Fault("wrong_bytes", None), "what comes is not what its checksum says, 3 times"),
    "a trickle": (Fault("trickle", None), r"only \d+ of 65536 bytes came in 0.3 s"),
    "expired credentials": (Fault("status", None, status=400, code="ExpiredToken"), "credentials have expired; renew"),
    "refused access": (Fault("status", None, status=403, code="AccessDenied"), "access is refused .AccessDenied."),
}


@pytest.mark.parametrize("name", LASTING)
def test_a_lasting_fault_ends_in_one_error_that_names_the_object_and_leaves_nothing(proxy, tmp_path, name):
    url = proxy.server.put("lost", content(2 * PART))
    fault, message = LASTING[name]
    proxy.faults = [Fault(**vars(fault))]
    store = proxy.store(tmp_path, attempts=3, timeout_seconds=0.3, **SMALL)
    with pytest.raises(ObjectStoreError, match=f"s3://{BUCKET}/lost: .*{message}"):
        store.download(url, tmp_path / "into" / "file")
    assert list((tmp_path / "into").iterdir()) == []


def test_what_is_not_there_or_vanishes_is_missing_and_not_tried_again(proxy, tmp_path):
    with pytest.raises(ObjectMissingError, match=f"s3://{BUCKET}/never: there is no such object"):
        proxy.store(tmp_path).read(f"s3://{BUCKET}/never")
    assert len(proxy.requests) == 1
    url = proxy.server.put("vanishing", content(2 * PART))
    proxy.faults = [Fault("vanish")]
    with pytest.raises(ObjectMissingError, match="vanishing"):
        proxy.store(tmp_path, **SMALL).download(url, tmp_path / "file")
    with pytest.raises(ObjectMissingError, match="no-such-bucket"):
        list(proxy.store(tmp_path).listing("s3://no-such-bucket/x"))


def test_an_object_that_the_caller_knows_better_than_the_store_is_refused(server, tmp_path):
    url = server.put("replaced", content(100, seed=1))
    store = ObjectStore(server.config(tmp_path, attempts=2))
    with pytest.raises(ObjectStoreError, match=r"replaced: content is .* was expected, 2 times; restore the object"):
        store.download(url, tmp_path / "file", sha256=storage.sha256(content(100)))


def test_an_object_replaced_while_it_is_read_is_begun_anew(proxy, tmp_path):
    url = proxy.server.put("moving", content(2 * PART))
    proxy.faults = [Fault("replace", new=content(3 * PART, seed=2))]
    proxy.store(tmp_path, **{**SMALL, "connections": 1}).download(url, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == content(3 * PART, seed=2)
    assert proxy.count("HEAD") == 2 and not proxy.faults


@pytest.mark.parametrize("size", [0, 100, 11 * 2**20])
def test_a_file_is_stored_whole_and_not_sent_twice(proxy, tmp_path, size):
    (tmp_path / "file").write_bytes(content(size))
    store, url = proxy.store(tmp_path), f"s3://{BUCKET}/stored/{size}"
    tag = store.upload(tmp_path / "file", url)
    sent = proxy.count("PUT")
    assert store.upload(tmp_path / "file", url) == tag and proxy.count("PUT") == sent
    store.download(url, tmp_path / "back")  # a large one's tag is of its parts, and is checked
    assert (tmp_path / "back").read_bytes() == content(size)


def test_an_interrupted_upload_goes_on_with_the_parts_that_are_missing(proxy, tmp_path):
    (tmp_path / "file").write_bytes(content(16 * 2**20))
    options = {"part_bytes": 5 * 2**20, "connections": 1, "attempts": 2}
    url = f"s3://{BUCKET}/resumed"
    proxy.faults = [Fault("status", None, "PUT", "partNumber=3")]
    with pytest.raises(ObjectStoreError, match="resumed: the store answers 500"):
        proxy.store(tmp_path, **options).upload(tmp_path / "file", url)
    proxy.faults, proxy.requests = [Fault("status", 1, "PUT", "partNumber=3")], []
    proxy.store(tmp_path, **options).upload(tmp_path / "file", url)
    assert proxy.count("PUT", "partNumber=1") == proxy.count("PUT", "partNumber=2") == 0
    assert proxy.count("PUT", "partNumber=3") == 2  # one met the fault
    assert proxy.store(tmp_path).about(url).size == 16 * 2**20


def test_without_credentials_the_error_says_how_to_give_them_unless_the_place_is_public(server, tmp_path, monkeypatch):
    url = server.put("public", b"for all")
    server.client.put_object_acl(Bucket=BUCKET, Key="public", ACL="public-read")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(ObjectStoreError, match=f"s3://{BUCKET}/public: no credentials; give them by AWS_PROFILE"):
        ObjectStore(server.config(tmp_path, region="us-east-1")).read(url)
    assert ObjectStore(server.config(tmp_path, region="us-east-1", anonymous=True)).read(url) == b"for all"
    with pytest.raises(ObjectStoreError, match="correct `profile`"):
        ObjectStore(server.config(tmp_path, profile="nobody")).read(url)


def test_an_endpoint_that_is_not_there_and_a_url_that_is_none(tmp_path, server):
    config = server.config(tmp_path, endpoint="http://127.0.0.1:9", attempts=2)
    started = time.monotonic()
    with pytest.raises(ObjectStoreError, match=r"no answer .*127.0.0.1:9.*in the last of 2 attempts"):
        ObjectStore(config).read(f"s3://{BUCKET}/x")
    assert time.monotonic() - started < 5
    with pytest.raises(StorageError, match="not a place on S3"):
        split_url("https://example.com/x")


def test_a_store_travels_to_another_process(server, tmp_path):
    url = server.put("pickled", b"x")
    store = ObjectStore(server.config(tmp_path))
    assert store.read(url) == pickle.loads(pickle.dumps(store)).read(url)  # noqa: S301
