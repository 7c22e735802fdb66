"""Small tokenizers of bytes with the special tokens and chat templates of published models."""

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

# As LLaDA's, whose tokenizer has Llama 3's form of messages.
LLADA = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# As Qwen 2.5's, with its own system message where there is none.
QWEN = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if message.role != 'system' or not loop.first %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
# As Qwen 3's: the thoughts of earlier answers are left out, and the last one begins with a block of them.
THINKING = (
    "{% for message in messages %}{% set content = message.content %}"
    "{% if message.role == 'assistant' %}{% set content = content.split('</think>')[-1].lstrip('\n') %}"
    "{% if loop.last %}{% set content = '<think>\n\n</think>\n\n' + content %}{% endif %}{% endif %}"
    "{{ '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
KINDS = {
    "llada": (
        ("<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>", *HEADERS),
        LLADA,
        {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "mask_token": "<|mdm_mask|>"},
    ),
    "llama": (
        ("<|begin_of_text|>", "<|end_of_text|>", *HEADERS),
        LLADA,
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
    ),
    "qwen": (("<|endoftext|>", "<|im_start|>", "<|im_end|>"), QWEN, {"eos_token": "<|im_end|>"}),
    "dream": (
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>"),
        QWEN,
        {"bos_token": "<|beginoftext|>", "eos_token": "<|endoftext|>", "mask_token": "<|mask|>"},
    ),
    "thinking": (("<|endoftext|>", "<|im_start|>", "<|im_end|>"), THINKING, {"eos_token": "<|im_end|>"}),
}


def write_chat_tokenizer(folder, kind="llada", *, template=None, in_file=False, options=None):
    """Write the folder of a `transformers` tokenizer of a kind of `KINDS`.

    `template` replaces its chat template, `in_file` stores it as `chat_template.jinja`, and `options` are those of the
    special tokens.
    """
    names, own_template, roles = KINDS[kind]
    template = own_template if template is None else template
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(n, special=True, normalized=False, **(options or {})) for n in names])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **roles}
    if in_file:
        (folder / "chat_template.jinja").write_text(template)
    else:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
