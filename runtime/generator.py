"""`Generator`: text from an exported engine, for embedding in programs and services."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from runtime.calibration import Calibration
from runtime.chat import ChatTemplate, Message
from runtime.checks import MOST_THREADS, whole
from runtime.drafter import Drafter
from runtime.drafts import TokenCorrection
from runtime.engine_file import EngineFile, PlanFile, read_engine_file
from runtime.engines import Engine
from runtime.errors import EngineFileError, InputError, PromptTooLongError
from runtime.loop import draft_and_verify
from runtime.ngrams import Ngrams
from runtime.noise import Noise
from runtime.sampler import Sampler
from runtime.sampling import Sampling, TokenLogProbability
from runtime.sizing import AdaptiveSizes, FixedSizes, Sizing
from runtime.tree import MOST_ROWS, TreeSizes
from runtime.tuning import Tuning, device_name, quick, read_tuning, write_tuning

FinishReason = Literal["stop", "length"]
Prompt = str | Sequence[Message]


@dataclass(frozen=True)
class GenerationResult:
    """An answer and how it came about.

    `tokens` are the new token ids, an end-of-text token included; `text` leaves special tokens out and ends before a
    stop string. `finish_reason` is "stop" (end of text, or a stop string) or "length" (token or context limit).
    `steps` counts the engine passes that made tokens certain, the prompt's last one included, so that
    `tokens_per_step` is tokens / steps and 1.0 for plain decoding. `decode_tokens_per_second` leaves the prompt and
    the first token out, and the time that the taker of a stream keeps each chunk; it is 0.0 when there was no second
    token. `accepted[n]` counts the steps that accepted n drafted tokens and so yielded n + 1: all but the prompt's, and
    the last one, which the answer's end cut short. `seed` is the one that sampling used, None for greedy decoding.
    `log_probabilities` has an entry for each token, if asked for.
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    finish_reason: FinishReason
    steps: int
    tokens_per_step: float
    decode_tokens_per_second: float
    time_to_first_token_s: float
    accepted: tuple[int, ...]
    seed: int | None
    log_probabilities: list[TokenLogProbability] | None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-ready dictionary."""
        return asdict(self)


@dataclass(frozen=True)
class GenerationChunk:
    """A part of an answer: text that is final, and the tokens of one engine pass, with their log-probabilities if
    asked for. The last one carries the result.
    """

    text: str
    tokens: list[int] = field(default_factory=list)
    result: GenerationResult | None = None
    log_probabilities: list[TokenLogProbability] | None = None


class Generator:
    """Decoding on an exported engine. One generator serves one request at a time; another thread that asks meanwhile
    gets an `InputError`.

    Raises `EngineFileError` when the engine's files are missing, damaged or of another version, and `InputError` for
    an engine that cannot run here. `device` "cpu" or "cuda" is where an ONNX engine runs, None on the CPU; plans run on
    the GPU always. `threads` is for the CPU. With `adapt` the sizes of trees are those that pay on this device and for
    this text. On a CPU the times of steps are measured the first time, which takes some seconds, and kept beside the
    engine; on a GPU `ht-bench tune` does so. Without them, or without `adapt`, sizes are the engine's own.
    `verify_weights=False` skips hashing the weights when loading (their size is always checked).
    """

    def __init__(
        self,
        engine: str | Path,
        *,
        device: str | None = None,
        threads: int | None = None,
        adapt: bool = True,
        verify_weights: bool = True,
    ) -> None:
        path = Path(engine)
        if threads is not None:
            whole("threads", threads, 1, MOST_THREADS)
        self.about: EngineFile = read_engine_file(path)
        if self.about.graph.name != path.name:
            raise EngineFileError(
                f"{path.with_suffix('.json')} describes {self.about.graph.name}, not {path.name}; export it again"
            )
        self.about.graph.check(path.parent, contents=True)
        if self.about.weights:
            self.about.weights.check(path.parent, contents=verify_weights)
        self._tokenizer = _load_tokenizer(self.about.tokenizer.check(path.parent, contents=True))
        self._chat: ChatTemplate | None = None
        if self.about.chat_template:
            template = self.about.chat_template.check(path.parent, contents=True).read_text(encoding="utf-8")
            self._chat = ChatTemplate(template, self.about.special_tokens)
        self._correction: TokenCorrection | None = None
        if self.about.correction:
            tables = self.about.correction.check(path.parent, contents=True)
            dims = self.about.dims
            self._correction = TokenCorrection.read(tables, dims.vocab_size, dims.num_steps)
        self.engine: Engine = _load_engine(path, self.about, device, threads)
        self._calibration = Calibration.of(self.about.transfer.get("acceptance", {}))
        self._in_use = threading.Lock()
        self.tuning: Tuning | None = None
        if adapt:
            self.tuning = self._tuning(path, on_cpu(self.about, device), threads)

    def encode(self, prompt: Prompt, *, raw: bool = False) -> list[int]:
        """Return the token ids of a prompt: of chat messages, of a string as one user message, or (`raw`, or a model
        without a chat template) of the string as it is.
        """
        if isinstance(prompt, str) and (raw or self._chat is None):
            return self._ids(prompt)
        if raw or self._chat is None:
            reason = "raw=True takes a string" if raw else "this model has no chat template"
            raise InputError(f"cannot encode chat messages: {reason}; give the prompt as one string")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self._ids(self._chat.render(messages), add_special_tokens=False)

    def _ids(self, text: str, **options: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"the prompt has {text[error.start]!r}, which is no character: bytes that are not UTF-8 become so; "
                "convert it to UTF-8"
            ) from error
        return list(self._tokenizer.encode(text, **options).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of `tokens`, without special ones."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 256,
        stop: Sequence[str] = (),
        speculate: bool = True,
        raw: bool = False,
        tree: TreeSizes | None = None,
        ngrams: bool = True,
        sampling: Sampling | None = None,
    ) -> GenerationResult:
        """Return the base model's answer to `prompt`; parameters as for `stream`."""
        for chunk in self.stream(
            prompt,
            max_new_tokens=max_new_tokens,
            stop=stop,
            speculate=speculate,
            raw=raw,
            tree=tree,
            ngrams=ngrams,
            sampling=sampling,
        ):
            if chunk.result is not None:
                return chunk.result
        raise AssertionError("a stream ends with its result")

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 256,
        stop: Sequence[str] = (),
        speculate: bool = True,
        raw: bool = False,
        tree: TreeSizes | None = None,
        ngrams: bool = True,
        sampling: Sampling | None = None,
    ) -> Iterator[GenerationChunk]:
        """Yield the base model's answer to `prompt` as it comes.

        `sampling` says how tokens are chosen, None greedily. `speculate=False` decodes plainly, one token a pass, to
        the same text, given the same seed. `stop` strings end the answer and are left out of its text. `tree` fixes the
        row counts of every step, which otherwise adapt to the device and to the text. `ngrams=False` drafts nothing
        from the text itself. Arguments are checked before the first chunk is asked for. Raises
        `PromptTooLongError` when the prompt leaves no room within the context limit, and `InputError` for any other
        argument that does not fit; also later, when `sampling` leaves no token to choose.
        """
        max_new_tokens = whole("max_new_tokens", max_new_tokens, 1)
        if not isinstance(stop, Sequence) or isinstance(stop, str) or not all(isinstance(s, str) and s for s in stop):
            raise InputError(f"stop must be a list of strings that are not empty, not {stop!r}")
        if sampling is None:
            sampling = Sampling()
        if not isinstance(sampling, Sampling):
            raise InputError(f"sampling must be a runtime.Sampling, not {sampling!r}")
        if sampling.min_new_tokens > max_new_tokens:
            raise InputError(
                f"min_new_tokens is {sampling.min_new_tokens}, more than max_new_tokens, {max_new_tokens}; change one "
                "of them"
            )
        for index in sampling.forced_tokens:
            if index >= max_new_tokens:
                raise InputError(
                    f"forced_tokens has new token {index}, and max_new_tokens is {max_new_tokens}; change one of them"
                )
        sizing = self._sizing(tree, speculate)
        ids = self.encode(prompt, raw=raw)
        if not ids:
            raise InputError("the prompt is empty; give at least one token")
        room = self.about.max_context - len(ids)
        if room < 1:
            raise PromptTooLongError(
                f"the prompt has {len(ids)} tokens, and the engine's context limit is {self.about.max_context} for "
                "prompt and answer together; shorten the prompt"
            )
        sampler = Sampler(sampling, ids, self.about.dims.vocab_size, self.about.stop_tokens)
        drafter = self.new_drafter(sizing, sampling.temperature, sampler.noise, ngrams=ngrams and speculate)
        return self._run(ids, min(max_new_tokens, room), stop, drafter, sampler)

    def new_drafter(
        self, sizing: Sizing, temperature: float = 0.0, noise: Noise | None = None, *, ngrams: bool = True
    ) -> Drafter:
        """Return what drafts one text with the engine's own statistics; parameters as for `Drafter`."""
        found = Ngrams() if ngrams else None
        return Drafter(sizing, self._correction, self._calibration, temperature, found, noise)

    def _tuning(self, path: Path, cpu: bool, threads: int | None) -> Tuning | None:
        """Return what was measured of the engine on this device; on a CPU it is measured quickly if nothing was."""
        device, about = device_name(self.engine, threads), self.about
        found = read_tuning(path, about.identity, device, about.dims)
        if found is None and cpu:
            found = quick(self.engine, about.tree, about.max_context, device, about.identity, self.new_drafter)
            # Where it cannot be kept it is measured again the next time.
            with contextlib.suppress(InputError):
                write_tuning(path, found)
        return found

    def _run(
        self, ids: list[int], max_new_tokens: int, stop: Sequence[str], drafter: Drafter, sampler: Sampler
    ) -> Iterator[GenerationChunk]:
        from runtime.text import TextStream

        text = TextStream(self._tokenizer, stop)
        tokens: list[int] = []
        released: list[str] = []

        def ends(token: int) -> bool:
            released.append(text.push(token))
            return text.stopped or token in self.about.stop_tokens

        answer = draft_and_verify(
            self.engine,
            ids,
            drafter,
            self.about.prompt_chunk,
            choose=sampler,
            max_new_tokens=max_new_tokens,
            ends=ends,
        )
        # Of each step, the prompt with the first one.
        seconds: list[float] = []
        accepted: Counter[int] = Counter()
        scores = sampler.log_probabilities
        last = False
        while not last:
            started = time.perf_counter()
            with self._used():
                certain = next(answer)
            count = len(tokens)
            tokens += certain
            seconds.append(time.perf_counter() - started)
            ended = text.stopped or tokens[-1] in self.about.stop_tokens
            last = ended or len(tokens) == max_new_tokens
            if count and not last:
                accepted[len(certain) - 1] += 1
            if not last:
                yield GenerationChunk("".join(released), certain, log_probabilities=scores and scores[count:])
                released.clear()
        released.append(text.finish())
        decoding = sum(seconds[1:])
        result = GenerationResult(
            text=text.text,
            tokens=tokens,
            prompt_tokens=len(ids),
            finish_reason="stop" if ended else "length",
            steps=len(seconds),
            tokens_per_step=len(tokens) / len(seconds),
            decode_tokens_per_second=(len(tokens) - 1) / decoding if decoding else 0.0,
            time_to_first_token_s=seconds[0],
            accepted=tuple(accepted[n] for n in range(max(accepted, default=-1) + 1)),
            seed=sampler.seed,
            log_probabilities=scores,
        )
        yield GenerationChunk("".join(released), certain, result, scores and scores[count:])

    @contextlib.contextmanager
    def _used(self) -> Iterator[None]:
        """Keep the engine for one step: its outputs hold until the next one."""
        if not self._in_use.acquire(blocking=False):
            raise InputError(
                "this generator is at work for another thread, or calls itself from a processor; take turns, or load "
                "one for each"
            )
        try:
            yield
        finally:
            self._in_use.release()

    def _sizing(self, tree: TreeSizes | None, speculate: bool) -> Sizing:
        steps = self.about.dims.num_steps
        if not speculate:
            if tree is not None:
                raise InputError("tree has no meaning with speculate=False; leave one of them out")
            return FixedSizes(TreeSizes.plain(steps))
        if tree is None and self.tuning is not None:
            return AdaptiveSizes(self.tuning.menu, self.tuning.rate, self.tuning.draft_value)
        return FixedSizes(self._checked(tree or self.about.tree))

    def _checked(self, sizes: TreeSizes) -> TreeSizes:
        if not isinstance(sizes, TreeSizes) or not isinstance(sizes.pseudo_rows, Sequence):
            raise InputError(f"tree must be a runtime.TreeSizes such as TreeSizes(4, (4, 2, 2)), not {sizes!r}")
        whole("tree_rows", sizes.tree_rows, 1, MOST_ROWS)
        for rows in sizes.pseudo_rows:
            whole("each of pseudo_rows", rows, 0, sizes.tree_rows)
        steps = self.about.dims.num_steps
        if len(sizes.pseudo_rows) != steps or any(sizes.pseudo_rows[sizes.draft_steps :]):
            raise InputError(
                f"pseudo_rows must be {steps} numbers, one for each draft step of this engine, with none after a 0: a "
                f"step is of use only after those before it; not {sizes.pseudo_rows}"
            )
        plan = self.about.plan
        if plan and (most := max(sizes.tree_rows, *sizes.pseudo_rows)) > plan.limits.max_rows:
            raise InputError(
                f"{sizes} does not fit: this plan was built for up to {plan.limits.max_rows} rows of each kind; use "
                f"fewer, or export it again with --max-rows {most}"
            )
        return sizes


def _load_tokenizer(path: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:
        raise EngineFileError(f"{path} is not a tokenizer ({error}); export the engine again") from error


def on_cpu(about: EngineFile, device: str | None) -> bool:
    """Whether an engine runs on the CPU when `device` is asked for."""
    return about.plan is None and device != "cuda"


def _load_engine(path: Path, about: EngineFile, device: str | None, threads: int | None) -> Engine:
    if device not in (None, "cpu", "cuda"):
        raise InputError(f"device must be cpu or cuda, not {device}")
    on_gpu = device == "cuda" or about.plan is not None
    if on_gpu and threads is not None:
        raise InputError("threads is for engines on the CPU; leave it out")
    if about.plan is not None:
        if device == "cpu":
            raise InputError(f"{path} is a TensorRT plan, which runs on a GPU only; export an .onnx engine for the CPU")
        return _load_plan(path, about, about.plan)
    if about.dims.dtype == "bfloat16" and not on_gpu:
        raise InputError(
            f"{path} is in bfloat16, in which ONNX Runtime computes on a GPU only; use device cuda, or export it with "
            "--precision fp32 for the CPU"
        )
    if on_gpu:
        from runtime.engines.onnxruntime_cuda import OnnxRuntimeCudaEngine

        return OnnxRuntimeCudaEngine(path, about.dims, about.tree, about.prompt_chunk, about.max_context)
    if about.cpu_graph is not None:
        from runtime.engines.onnxruntime_cpu import OnnxRuntimeCpuEngine

        lowered = about.cpu_graph.check(path.parent, contents=True)
        return OnnxRuntimeCpuEngine(lowered, about.dims, threads)
    from runtime.engines.onnxruntime import OnnxRuntimeEngine

    return OnnxRuntimeEngine(path, about.dims, threads)


def _load_plan(path: Path, about: EngineFile, plan: PlanFile) -> Engine:
    from plugins.binaries import KernelBinaries
    from runtime.engines.tensorrt import TensorRTEngine

    kernels = plan.kernels.check(path.parent, contents=True)
    try:
        binaries = KernelBinaries.from_bytes(kernels.read_bytes())
    except ValueError as error:
        raise EngineFileError(f"{kernels}: {error}; export the engine again") from error
    return TensorRTEngine(path, about.dims, plan, about.graph.sha256, about.tree, binaries)
