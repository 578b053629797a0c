"""Load the built-in model and stream an answer; prints what drafting did."""

from __future__ import annotations

from mlx_redrafter import load, stream_generate


def main() -> None:
    model, tokenizer = load()
    question = [{"role": "user", "content": "Name three rivers in France."}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)
    for response in stream_generate(model, tokenizer, prompt, max_tokens=100):
        print(response.text, end="", flush=True)
    stats = response.stats
    print(f"\n\n{stats.tokens} tokens in {stats.steps} passes: {stats.tokens_per_step:.2f} a pass")


if __name__ == "__main__":
    main()
