"""Limits in front of an application that takes its time."""

import asyncio

from blip_pipelines.inference.limits import Limits, LimitsConfig

JSON = (b"content-type", b"application/json")
TEXT = (b"content-type", b"text/csv")


def ask(application, body=b"{}", headers=(TEXT,), method="POST", parts=1):
    """Status, headers and body of one request, as an ASGI server makes it."""

    async def call():
        sent = []
        size = max(1, -(-len(body) // parts))
        left = [body[at : at + size] for at in range(0, len(body), size)] or [b""]

        async def receive():
            if left:
                part = left.pop(0)
                return {"type": "http.request", "body": part, "more_body": bool(left)}
            return await asyncio.Event().wait()

        async def send(message):
            sent.append(message)

        await application({"type": "http", "method": method, "headers": list(headers)}, receive, send)
        return sent[0]["status"], dict(sent[0]["headers"]), b"".join(message.get("body", b"") for message in sent)

    return call()


def slow(seconds=0.02):
    """An application that says how many requests it has at a time."""
    state = {"now": 0, "most": 0}

    async def application(scope, receive, send):
        message = await receive()
        state["now"] += 1
        state["most"] = max(state["most"], state["now"])
        await asyncio.sleep(seconds)
        state["now"] -= 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": message["body"]})

    return application, state


def all_at_once(limits, count, **options):
    async def everything():
        return await asyncio.gather(*(ask(limits, **options) for _ in range(count)))

    return asyncio.run(everything())


def test_every_request_is_answered_or_told_when_to_come_again():
    application, state = slow()
    answers = all_at_once(Limits(application, LimitsConfig(running=2, waiting=10)), 50)
    statuses = [status for status, _, _ in answers]
    assert statuses.count(200) == 12 and statuses.count(503) == 38
    assert state["most"] == 2
    assert all(int(headers[b"retry-after"]) >= 1 for status, headers, _ in answers if status == 503)


def test_who_waits_too_long_is_told_so():
    application, _ = slow(0.2)
    answers = all_at_once(Limits(application, LimitsConfig(running=1, waiting=5, patience_seconds=0.1)), 3)
    assert sorted(status for status, _, _ in answers) == [200, 503, 503]


def test_a_body_over_the_limit_is_refused_also_where_it_does_not_say_its_length():
    application, _ = slow(0)
    limits = Limits(application, LimitsConfig(body_bytes=100))

    async def some():
        return [
            await ask(limits, b"x" * 100, parts=7),
            await ask(limits, b"x" * 101, parts=7),
            await ask(limits, b"x" * 5000, parts=100),
            await ask(limits, b"x", [TEXT, (b"content-length", b"999999")]),
            await ask(limits, b"still up"),
        ]

    assert [status for status, _, _ in asyncio.run(some())] == [200, 413, 413, 413, 200]


def test_what_is_no_request_does_not_reach_the_application():
    application, _ = slow(0)
    limits = Limits(application, LimitsConfig())
    deep = b"[" * 100_000 + b"]" * 100_000

    async def some():
        bodies = ((b"{}", [JSON]), (b"{", [JSON]), (deep, [JSON]), (b"\xff\xfe{", [JSON]), (b"", [JSON]), (b"{}", []))
        return [await ask(limits, body, headers) for body, headers in bodies]

    assert [status for status, _, _ in asyncio.run(some())] == [200, 400, 400, 400, 400, 415]


def test_a_body_that_does_not_come_is_not_waited_for():
    application, _ = slow(0)

    async def silent():
        sent = []

        async def receive():
            await asyncio.Event().wait()

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "headers": []}
        await Limits(application, LimitsConfig(body_seconds=0.05))(scope, receive, send)
        return sent[0]["status"]

    assert asyncio.run(silent()) == 408


def test_an_application_that_fails_leaves_its_place_to_the_next():
    async def failing(scope, receive, send):
        raise RuntimeError("no")

    limits = Limits(failing, LimitsConfig(running=1, waiting=0))

    async def twice():
        outcomes = []
        for _ in range(2):
            try:
                await ask(limits)
            except RuntimeError as error:
                outcomes.append(str(error))
        return outcomes

    assert asyncio.run(twice()) == ["no", "no"]


def test_reading_is_never_in_line():
    application, _ = slow(0.1)
    limits = Limits(application, LimitsConfig(running=1, waiting=0))

    async def everything():
        writing = [ask(limits), ask(limits)]
        return await asyncio.gather(*writing, *(ask(limits, method="GET") for _ in range(3)))

    assert [status for status, _, _ in asyncio.run(everything())] == [200, 503, 200, 200, 200]
