"""A tokenizer with a chat template, and conversations to fine-tune on."""

import json

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKED = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}
{%- generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
{%- else %}{{ message.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
UNMARKED = MARKED.replace("{%- generation %}", "").replace("{% endgeneration %}", "")
TALK = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "How many legs has a spider?"},
    {"role": "assistant", "content": "Eight, of course."},
    {"role": "user", "content": "And a héron? 🐦"},
    {"role": "assistant", "content": "Two — mostly."},
]
SAID = ["You are brief.", "What is two and two?", "It is four.", "Eight legs, two wings, and a long beak", "🐦 héron"]


def write_chat_tokenizer(folder, template=MARKED, **config):
    """Write a byte-level tokenizer.json and its tokenizer_config.json with a template; return the first's path."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=330, initial_alphabet=alphabet, special_tokens=list(SPECIAL), show_progress=False)
    tokenizer.train_from_iterator(SAID * 20, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "<|endoftext|>", "chat_template": template, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**names, **config}))
    return folder / "tokenizer.json"


def write_talks(path, talks, key="messages"):
    """Write a line for each conversation, or as it is for a str; return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(talk if isinstance(talk, str) else json.dumps({key: talk}) for talk in talks) + "\n")
    return path
