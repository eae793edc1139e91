"""Chat templates of the kinds that are met, written short; right ones and wrong ones."""

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# No generation prompt: the answer follows the question's end. Contents are trimmed, roles must take turns.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + eos_token }}{% endif %}"
    "{% endfor %}"
)
# Drops the reasoning of every answer before the last question: no rendering is the beginning of the next one.
QWEN3 = """
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- set content = m.content %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last %}
            {{- '<|im_start|>assistant\\n<think>\\n' + thought + '\\n</think>\\n\\n' + content + '<|im_end|>\\n' }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content + '<|im_end|>\\n' }}
        {%- endif %}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
GENERATION = """
{%- for m in messages -%}
    {{- '<|im_start|>' + m.role + '\\n' -}}
    {%- if m.role == 'assistant' -%}
        {%- generation -%}{{ m.content + '<|im_end|>' }}{%- endgeneration -%}
    {%- else -%}
        {{- m.content + '<|im_end|>' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Nothing but text: no special token closes a turn.
PLAIN = (
    "{% for m in messages %}{{ {'user': 'Q: ', 'assistant': 'A: '}[m.role] + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
)

SPECIAL = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"]

# name -> template, how an answer's content is trimmed, what is trained before it, what closes it
GOOD = {
    "chatml": ("chatml", str, "", "<|im_end|>"),
    "dolly": ("dolly", str, "", "<|endoftext|>"),
    "llama3": (LLAMA3, str.strip, "", "<|eot_id|>"),
    "mistral": (MISTRAL, str.strip, " ", "<|endoftext|>"),
    "generation": (GENERATION, str, "", "<|im_end|>"),
    "default system": (DEFAULT_SYSTEM, str, "", "<|im_end|>"),
    "plain": (PLAIN, str, " ", "\n"),
}

_CHATML = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"

# name -> template, what the error says
WRONG = {
    "generation block around the user": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% endfor %}" + _PROMPT,
        "would train the user's text",
    ),
    "generation block around the marker": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
        + _CHATML
        + "{% endgeneration %}{% else %}"
        + _CHATML
        + "{% endif %}{% endfor %}"
        + _PROMPT,
        "role marker",
    ),
    "generation block that ends late": (
        "{{ '<|im_start|>user\n' }}{% for m in messages %}{% if m.role == 'user' %}"
        "{{ m.content + '<|im_end|>\n<|im_start|>assistant\n' }}{% else %}"
        "{% generation %}{{ m.content + '<|im_end|>\n<|im_start|>user\n' }}{% endgeneration %}{% endif %}{% endfor %}",
        "role marker",
    ),
    "generation block around nothing": (
        "{% for m in messages %}{% generation %}{{ '<|im_start|>' }}{% endgeneration %}"
        "{{ m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}" + _PROMPT,
        "nothing would be trained",
    ),
    "headers of the other role": (
        "{% for m in messages %}{{ '<|im_start|>' + ('user' if m.role == 'assistant' else 'assistant') + '\n' "
        "+ m.content + '<|im_end|>\n' }}{% endfor %}" + _PROMPT,
        "trained in one place and asked in another",
    ),
    "contents of the turn before": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + messages[loop.index0 - 1].content "
        "+ '<|im_end|>\n' }}{% endfor %}" + _PROMPT,
        "one place and asked in another|change places|shifts the turns",
    ),
    "answers lost": (
        "{% for m in messages %}{% if m.role == 'user' %}" + _CHATML + "{% endif %}{% endfor %}" + _PROMPT,
        "lost",
    ),
    "answers cut": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content[:5] + '<|im_end|>\n' }}{% endfor %}"
        + _PROMPT,
        "lost",
    ),
    "answers rewritten": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content | upper + '<|im_end|>\n' }}{% endfor %}"
        + _PROMPT,
        "changed",
    ),
    "generation prompt always": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '\n' }}{% endfor %}"
        "{{ '<|im_start|>assistant\n' }}",
        "role marker",
    ),
    "refuses all": ("{{ raise_exception('never') }}", "refuses each"),
    "not jinja": ("{% for m in messages %}{{ m.content }}", "not a? ?Jinja"),
}
