"""Measure `runtime.serving.ray` on this machine, without a Ray cluster: routing by prefix beside Ray's own routing, a
replica that is killed under load, and replicas that come and go with the load.

python3 docs/measuring/measure_ray.py engine.onnx --part routing --json ray.json     with [ray,cpu] and httpx
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import ray
from ray import serve

from runtime.serving.ray import build

PORT, MODEL, NAME = 8329, "measured", "measured"
PERSONAS, QUESTIONS, CLIENTS = 8, 10, 4
TRADES = ("baker", "sailor", "gardener", "teacher", "painter", "doctor", "tailor", "miner")
# Waiting for replicas, in seconds.
LONGEST = 90.0


def persona(number: int) -> str:
    """Return a system prompt of about 150 tokens, which differs from the others within its first words."""
    trade = TRADES[number]
    return f"You are a {trade} of long experience. " + " ".join(
        f"Rule {rule}: answer question {rule} of a guest kindly, in few words, and say what you do not know."
        for rule in range(1, 7)
    )


class Served:
    """An application of two replicas at most, for the time of a block."""

    def __init__(self, engine: Path, **options: Any) -> None:
        given = {"engine": str(engine.resolve()), "models": MODEL, "threads": 1, "adapt": False, **options}
        self.options = given
        self.url = f"http://127.0.0.1:{PORT}/v1/chat/completions"

    def __enter__(self) -> Served:
        serve.run(build(self.options), name=NAME)
        return self

    def __exit__(self, *_: object) -> None:
        serve.delete(NAME)

    def ask(self, system: str, question: str, **more: Any) -> dict[str, Any]:
        """Return the answer: of a stream, whether it was whole, and what was told if not."""
        messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        body = {"model": MODEL, "messages": messages, "temperature": 0, **more}
        found = httpx.post(self.url, json=body, timeout=120)
        if not more.get("stream"):
            found.raise_for_status()
            return dict(found.json())
        whole = found.status_code == 200 and found.text.endswith("data: [DONE]\n\n") and '"error"' not in found.text
        return {"whole": whole, "lost": "replica_lost" in found.text, "told": "" if whole else found.text[-200:]}

    @staticmethod
    def replicas() -> list[str]:
        """Return the names of the actors that are replicas."""
        names = [one["name"] for one in ray.util.list_named_actors(all_namespaces=True)]
        return [name for name in names if f"{NAME}#Replica#" in name]

    @staticmethod
    def running() -> int:
        """Return how many replicas answer."""
        states: dict[Any, int] = dict(serve.status().applications[NAME].deployments["Replica"].replica_states)
        return sum(count for state, count in states.items() if str(getattr(state, "value", state)) == "RUNNING")

    def wait_for(self, count: int) -> float:
        """Wait until so many replicas answer, and return how long it took."""
        begun = time.monotonic()
        while self.running() != count:
            if time.monotonic() - begun > LONGEST:
                raise TimeoutError(f"there are {self.running()} replicas, not {count}")
            time.sleep(0.1)
        return round(time.monotonic() - begun, 1)


class Clients:
    """Clients that ask again and again, until they are told to leave."""

    def __init__(self, served: Served, count: int, **asked: Any) -> None:
        self.ended: list[tuple[float, dict[str, Any]]] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(served, number, asked)) for number in range(count)]
        for one in self._threads:
            one.start()

    def _ask(self, served: Served, number: int, asked: dict[str, Any]) -> None:
        while not self._over.is_set():
            found = served.ask(persona(number % PERSONAS), "Who are you?", stream=True, ignore_eos=True, **asked)
            self.ended.append((time.monotonic(), found))

    def leave(self) -> None:
        """Let requests under way end."""
        self._over.set()
        for one in self._threads:
            one.join()


def routing(engine: Path) -> dict[str, Any]:
    """Ask `QUESTIONS` questions of each persona, by `CLIENTS` clients, in an order that mixes them."""
    found = {}
    for name, by_prefix in (("prefix", True), ("power of two choices", False)):
        with Served(engine, min_replicas=2, max_replicas=2, route_by_prefix=by_prefix) as served:
            pairs = [(number, question) for question in range(QUESTIONS) for number in range(PERSONAS)]
            begun = time.monotonic()
            with ThreadPoolExecutor(CLIENTS) as pool:
                usages = [
                    answer["usage"]
                    for answer in pool.map(
                        lambda pair, served=served: served.ask(
                            persona(pair[0]), f"Question {pair[1]}: what do you do first?", max_tokens=4
                        ),
                        pairs,
                    )
                ]
            cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
            prompt = [usage["prompt_tokens"] for usage in usages]
            found[name] = {
                "requests": len(usages),
                "prompt_tokens": sum(prompt),
                "cached_tokens": sum(cached),
                "cached_share": round(sum(cached) / sum(prompt), 4),
                "computed_tokens": sum(prompt) - sum(cached),
                "found_less_than_half": sum(2 * one < all_ for one, all_ in zip(cached, prompt, strict=True)),
                "seconds": round(time.monotonic() - begun, 1),
            }
    return found


def loss(engine: Path) -> dict[str, Any]:
    """Kill one of two replicas under the load of 8 clients."""
    with Served(engine, min_replicas=2, max_replicas=2) as served:
        clients = Clients(served, 8, max_tokens=24)
        time.sleep(10)
        name = served.replicas()[0]
        killed = time.monotonic()
        ray.kill(ray.get_actor(name, namespace="serve"))
        while name in (names := served.replicas()) or len(names) < 2:
            time.sleep(0.1)
        served.wait_for(2)
        again = round(time.monotonic() - killed, 1)
        time.sleep(3)
        clients.leave()
    lost = [(at, told) for at, told in clients.ended if not told["whole"]]
    return {
        "clients": 8,
        "requests": len(clients.ended),
        "whole": sum(told["whole"] for _, told in clients.ended),
        "lost": len(lost),
        "lost_with_replica_lost": sum(told["lost"] for _, told in lost),
        "last_lost_s": round(max((at - killed for at, _ in lost), default=0.0), 2),
        "whole_before_two_again": sum(told["whole"] and killed < at < killed + again for at, told in clients.ended),
        "two_again_s": again,
    }


def scaling(engine: Path) -> dict[str, Any]:
    """Let 8 clients make one replica two, and 2 that stay let it be one again while they go on."""
    options = {"max_replicas": 2, "max_batch": 2, "upscale_s": 2, "downscale_s": 5, "drain_s": 60}
    with Served(engine, **options) as served:
        stay = Clients(served, 2, max_tokens=60)
        many = Clients(served, 6, max_tokens=60)
        up = served.wait_for(2)
        time.sleep(5)
        many.leave()
        down = served.wait_for(1)
        gone = time.monotonic()
        while len(served.replicas()) > 1 and time.monotonic() - gone < LONGEST:
            time.sleep(0.1)
        stay.leave()
    ended = [told for one in (many, stay) for _, told in one.ended]
    return {
        "options": options,
        "requests": len(ended),
        "whole": sum(told["whole"] for told in ended),
        "lost": [told["told"] for told in ended if not told["whole"]],
        "two_replicas_after_s": up,
        "one_replica_after_s": down,
        "drained_in_s": round(time.monotonic() - gone, 1),
    }


PARTS = {"routing": routing, "loss": loss, "scaling": scaling}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one part or all, print them, and add them to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path, help="engine file (.onnx)")
    parser.add_argument("--part", choices=PARTS, action="append", help="may repeat (default: all)")
    parser.add_argument("--json", type=Path, help="add the results to this file")
    options = parser.parse_args(arguments)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    root = str(Path(__file__).resolve().parents[2])
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=80 << 20,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": root}},
    )
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    file: Path | None = options.json
    results: dict[str, Any] = json.loads(file.read_text()) if file is not None and file.exists() else {}
    for part in options.part or PARTS:
        results[part] = PARTS[part](options.engine)
        print(json.dumps({part: results[part]}, indent=1), flush=True)
        if file is not None:
            file.write_text(json.dumps(results, indent=1) + "\n")
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
