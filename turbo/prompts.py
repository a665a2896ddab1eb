"""The words of prompts: Qwen's special tokens and chat template, as the tiny models have them.

A prompt is cut in two (`turbo.families.Frame`):

    prefix    <|im_start|>user\\n <|vision_start|> <|image_pad|>*n <|vision_end|> FIXED
    suffix    STATE <|im_end|>\\n <|im_start|>assistant\\n

The prefix does not change within an episode: its keys and values are computed once and shared by
all steps (and by all environments that play the same deal). The suffix carries the state. Each part
is encoded by itself, so that the token boundary between them is always in the same place.

Left out: tokenizers and models (`turbo.tiny`, `turbo.model`).
"""

PAD, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
SPECIAL_TOKENS = (PAD, IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
