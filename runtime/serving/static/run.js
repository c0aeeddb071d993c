// One answer as it came: its text, its passes, and what they took.

export const HUES = 6;

export class Run {
  constructor(speculate) {
    this.speculate = speculate;
    this.text = "";
    this.passes = [];
    this.finish = null;
    this.begun = performance.now();
    this.first = this.last = null;
  }

  /** Take the passes and the text of a chunk; return those of its passes that made tokens certain. */
  take(choice) {
    this.text += choice.delta.content ?? "";
    this.finish = choice.finish_reason ?? this.finish;
    const passes = choice.passes ?? [];
    this.passes.push(...passes);
    if (passes.some((pass) => pass.tokens.length)) {
      this.last = performance.now();
      this.first ??= this.last;
    }
    return passes.filter((pass) => pass.tokens.length);
  }

  /** The passes that made tokens certain: steps. */
  get steps() {
    return this.passes.filter((pass) => pass.tokens.length);
  }

  get tokens() {
    return this.passes.reduce((sum, pass) => sum + pass.tokens.length, 0);
  }

  /** Seconds from the first token to the last: the prompt is left out. */
  get decoding() {
    return (this.last - this.first) / 1000;
  }

  get stats() {
    const { tokens, decoding } = this;
    const steps = this.steps.length;
    return {
      tokens,
      steps,
      perStep: steps ? tokens / steps : 0,
      perSecond: decoding > 0 ? (tokens - 1) / decoding : 0,
      first: this.first === null ? 0 : (this.first - this.begun) / 1000,
      decoding,
    };
  }
}
