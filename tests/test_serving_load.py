"""Many clients at once, good and bad: every good answer is that of a lone run, and nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlx_openelm import stream_generate

import httpx2
import pytest
from serve_processes import process
from serving_apps import expected_of, tiny

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SHARED = "HAMLET, PRINCE OF DENMARK. " * 12

# Requests, with the options of the lone run.
GOOD: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (f"{SHARED if n % 3 else ''}Enter KING {n}", {"max_tokens": 3 + n, **keys}, options)
    for n, (keys, options) in enumerate(
        [
            ({}, {}),
            ({"temperature": 0.8, "seed": 3}, {"temp": 0.8, "seed": 3}),
            ({"stop": ["e"]}, {"stop": ["e"]}),
            ({"logprobs": 2}, {"top_logprobs": 2}),
            ({"temperature": 1, "seed": 5, "top_p": 0.9}, {"temp": 1.0, "seed": 5, "top_p": 0.9}),
            ({"frequency_penalty": 0.7}, {"frequency_penalty": 0.7}),
            ({"logit_bias": {"10": -50}}, {"logit_bias": {10: -50}}),
            ({"kv_bits": 8, "kv_group_size": 32}, {"kv_bits": 8, "kv_group_size": 32}),
        ]
        * 2
    )
]
# Bodies and heads that no client should send.
BODIES = [
    *(
        b"{",
        b"[]",
        b"null",
        b'{"prompt": 3}',
        b'{"prompt": "a", "max_tokens": 1e400}',
        b'{"prompt": "\xff"}',
        b"\x00" * 99,
    ),
    *(
        b'{"prompt": "a", "n": ' + b"9" * 9000 + b"}",
        b'{"prompt": ' + b"[" * 90_000,
        b'{"a": ' * 900 + b"1" + b"}" * 900,
    ),
    *(b'{"prompt": "a", "temperature": NaN}', b'{"prompt": "a", "unknown": 1}', b'{"prompt": [[1], 3]}'),
    *(b'{"prompt": "a", "regex": "("}', b'{"prompt": "a", "logit_bias": {"999999": 1}}', b'{"prompt": [-1]}'),
    *(b'{"prompt": "a", "model": "b"}', b'{"prompt": "' + b"a " * 2000 + b'"}', b""),
]
HEADS = [
    b"\x00\xff\r\n\r\n",
    b"GET /" + b"a" * 70_000,
    b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    b"HELO\r\n\r\n",
]


def expected() -> list[tuple[str, list[float]]]:
    """The texts, as they follow their prompts, and log-probabilities of lone runs."""
    model, tokenizer = tiny()
    found = []
    for prompt, keys, options in GOOD:
        options |= {"max_tokens": keys["max_tokens"], "echo": True}
        pieces = list(stream_generate(model, tokenizer, prompt, **options))
        text = "".join(piece.text for piece in pieces).removeprefix(prompt)
        found.append((text, [piece.logprob for piece in pieces]))
    return found


class Crowd:
    """Clients of every kind."""

    def __init__(self, url: str, pid: int, answers: list[tuple[str, list[float]]]):
        self.url, self.pid, self.answers = url, pid, answers
        self.host, port = url.removeprefix("http://").split(":")
        self.port = int(port)
        self.checked = self.left = self.refused = 0
        self.resident: list[int] = []

    async def one(self, client: httpx2.AsyncClient, end: float, seed: int) -> None:
        chance = random.Random(seed)
        while time.monotonic() < end:
            kind = chance.random()
            if kind < 0.6:
                await self.good(client, chance)
            elif kind < 0.75:
                await self.leave(chance)
            elif kind < 0.9:
                await self.bad(client, chance)
            else:
                await self.odd(chance)

    async def good(self, client: httpx2.AsyncClient, chance: random.Random) -> None:
        number = chance.randrange(len(GOOD))
        prompt, keys, _ = GOOD[number]
        body = {"prompt": prompt, **keys}
        if chance.random() < 0.5:
            response = await client.post(self.url + COMPLETIONS, json=body)
            assert response.status_code == 200, response.text
            choices = response.json()["choices"]
        else:
            async with client.stream("POST", self.url + COMPLETIONS, json={**body, "stream": True}) as stream:
                assert stream.status_code == 200
                lines = [line async for line in stream.aiter_lines() if line]
            assert lines.pop() == "data: [DONE]"
            choices = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines]
        text, logprobs = self.answers[number]
        assert "".join(choice["text"] for choice in choices) == text, number
        if "logprobs" in keys:
            found = [one for choice in choices for one in choice["logprobs"]["token_logprobs"]]
            assert found == expected_of(logprobs)
        self.checked += 1

    async def leave(self, chance: random.Random) -> None:
        """Ask for a long text, and go: at once, or after a while; streamed or not."""
        body = {"prompt": "ROMEO.", "max_tokens": 900, "stream": chance.random() < 0.5, "n": chance.randrange(1, 3)}
        reader, writer = await self.send(COMPLETIONS, json.dumps(body).encode())
        with suppress(TimeoutError):
            await asyncio.wait_for(reader.read(chance.randrange(1, 5000)), chance.random() * 0.3)
        if chance.random() < 0.3:
            writer.transport.abort()
        writer.close()
        self.left += 1

    async def bad(self, client: httpx2.AsyncClient, chance: random.Random) -> None:
        response = await client.post(self.url + COMPLETIONS, content=chance.choice(BODIES))
        assert response.status_code in (400, 404), response.text
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        self.refused += 1

    async def odd(self, chance: random.Random) -> None:
        """Heads that are wrong or come one byte at a time, and readers that are slow."""
        kind = chance.randrange(3)
        with suppress(ConnectionError):
            if kind == 0:
                reader, writer = await asyncio.open_connection(self.host, self.port)
                writer.write(chance.choice(HEADS))
                with suppress(TimeoutError):
                    await asyncio.wait_for(reader.read(100), 0.3)
            elif kind == 1:
                reader, writer = await asyncio.open_connection(self.host, self.port)
                for byte in b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n":
                    writer.write(bytes([byte]))
                    await asyncio.sleep(0.005)
                assert (await reader.read(12)) == b"HTTP/1.1 200"
            else:
                body = {"prompt": "ROMEO.", "max_tokens": 60, "stream": True, "logprobs": 5}
                reader, writer = await self.send(COMPLETIONS, json.dumps(body).encode())
                for _ in range(10):
                    await reader.read(500)
                    await asyncio.sleep(0.03)
            writer.close()

    async def send(self, path: str, content: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(self.host, self.port, limit=4096)
        head = f"POST {path} HTTP/1.1\r\nHost: {self.host}\r\nContent-Length: {len(content)}\r\n\r\n"
        writer.write(head.encode() + content)
        return reader, writer

    async def watch(self, end: float) -> None:
        while time.monotonic() < end:
            status = Path(f"/proc/{self.pid}/status")
            if status.is_file():
                found = re.search(r"VmRSS:\s+(\d+) kB", status.read_text())
                self.resident.append(int(found[1]) * 1024 if found else 0)
            await asyncio.sleep(0.5)

    async def run(self, clients: int, seconds: float) -> None:
        end = time.monotonic() + seconds
        limits = httpx2.Limits(max_connections=clients)
        async with httpx2.AsyncClient(timeout=120, limits=limits) as client:
            watching = asyncio.ensure_future(self.watch(end))
            await asyncio.gather(*(self.one(client, end, seed) for seed in range(clients)))
            await watching


def metric(url: str, name: str) -> float:
    lines = [line for line in httpx2.get(f"{url}/metrics").text.splitlines() if line.startswith(f"{name} ")]
    return float(lines[0].split()[1])


def run(clients: int, seconds: float) -> Crowd:
    answers = expected()
    flags = ("--log-level", "critical", "--max-queue", "500", "--prompt-cache-bytes", "20MB", "--memory-limit", "1GB")
    with process(*flags) as server:
        crowd = Crowd(server.url, server.process.pid, answers)
        asyncio.run(crowd.run(clients, seconds))
        end = time.monotonic() + 30
        while metric(server.url, "mlx_openelm_texts_running") or metric(server.url, "mlx_openelm_texts_waiting"):
            assert time.monotonic() < end, "texts are left"
            time.sleep(0.05)
        assert metric(server.url, "mlx_openelm_text_bytes_reserved") == 0
        assert metric(server.url, "mlx_openelm_prompt_cache_bytes") <= 20_000_000
        assert metric(server.url, "mlx_openelm_engine_restarts_total") == 0
        assert httpx2.get(f"{server.url}/health").status_code == 200
    return crowd


def test_every_good_answer_is_right_among_bad_requests() -> None:
    crowd = run(10, 1.5)
    assert min(crowd.checked, crowd.left, crowd.refused) > 0


@pytest.mark.slow
def test_fifty_clients_for_a_minute() -> None:
    crowd = run(50, 60)
    assert min(crowd.checked, crowd.left, crowd.refused) > 50
    resident = crowd.resident
    early, late = resident[len(resident) // 4 : len(resident) // 2], resident[-len(resident) // 4 :]
    assert max(late) < 1.15 * max(early) + 30_000_000  # flat, once caches and buffers have their sizes
