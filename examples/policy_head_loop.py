"""`turbo.kernels.policy_head` in a training loop of plain transformers and peft.

    loss = - mean(advantage * log p[token]) - 0.01 mean(entropy) + 0.1 mean(KL(policy || base))

All three come from hidden states and the head's matrix, with gradient, and no [T, V] tensor of
logits is ever held; with a vocabulary of 150,000 that is most of the memory of such a loop. Here a
tiny random model learns to write tokens of the first half of its vocabulary:

    python -m examples.policy_head_loop

Left out: everything that makes this PPO.
"""

import torch
from torch import Tensor

from turbo.kernels.policy_head import policy_head

VOCABULARY, PROMPT, TOKENS, ROWS = 512, 4, 8, 32


def new_model(seed: int = 0):
    """A random Qwen2 with LoRA factors."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.2,  # or random logits would all be alike
    )
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"])
    return get_peft_model(Qwen2ForCausalLM(config), lora)


def hidden_states(model, ids: Tensor) -> Tensor:
    """The last layer's normed states that predict the answer's tokens.  # [R * T, D]"""
    states = model.get_base_model().model(input_ids=ids).last_hidden_state  # [R, L, D]
    return states[:, PROMPT - 1 : -1].flatten(0, 1)


def loss_of(model, ids: Tensor, advantage: Tensor) -> Tensor:
    """The loss of sampled rows `ids` [R, L], with an advantage for each token [R * T]."""
    with torch.no_grad(), model.disable_adapter():
        base = hidden_states(model, ids)
    out = policy_head(
        hidden_states(model, ids),
        model.get_output_embeddings().weight,
        ids[:, PROMPT:].flatten(),
        teacher_hidden=base,
        want=("logprob", "entropy", "reverse_kl"),
    )
    gain = (advantage * out.logprob).mean() + 0.01 * out.entropy.mean()
    return 0.1 * out.reverse_kl.mean() - gain


def train(steps: int = 30) -> list[float]:
    """REINFORCE; the share of wanted tokens in each step."""
    model = new_model()
    factors = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=2e-2)
    shares = []
    for _ in range(steps):
        prompt = torch.randint(VOCABULARY, (ROWS, PROMPT))
        ids = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            top_k=0,
            max_new_tokens=TOKENS,
            pad_token_id=0,
        )
        reward = (ids[:, PROMPT:] < VOCABULARY // 2).float().flatten()
        loss_of(model, ids, reward - reward.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        shares.append(reward.mean().item())
    return shares


if __name__ == "__main__":
    for step, share in enumerate(train()):
        print(f"step {step:2}: {share:.0%} wanted tokens")
