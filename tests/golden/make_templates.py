"""Makes tests/golden/templates.json: chat templates as families write them.

    python tests/golden/make_templates.py     (transformers, tokenizers, jinja2)

The programs are written for this purpose, with the constructs that templates of the
families are built from, and held with what transformers makes of conversations.
"""

from __future__ import annotations

import json
import pathlib

import tokenizers as tk
import transformers

FILE = pathlib.Path(__file__).resolve().parent / "templates.json"
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Finds <b>words</b> & 'names' – über",
        "parameters": {"type": "object", "properties": {"q": {"type": "string"}}},
    },
}
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"q": "é<"}}}
CONVERSATIONS = {
    "one": [{"role": "user", "content": "  hello\n"}],
    "system": [
        {"role": "system", "content": "Be “kind”. "},
        {"role": "user", "content": "你好 👩🏽\u200d🚀 {{ x }} {% if %}"},
    ],
    "thought": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nso\n</think>\n\nb "},
        {"role": "user", "content": ""},
    ],
    "tool": [
        {"role": "user", "content": "find"},
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": '{"found": ["x", null]}', "name": "look_up"},
        {"role": "tool", "content": "y"},
        {"role": "user", "content": "more"},
    ],
    "twice": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
    "odd": [{"role": "critic", "content": "a\tb"}],
}
VARIABLES = {
    "plain": {},
    "no prompt": {"add_generation_prompt": False},
    "tools": {"tools": [TOOL, TOOL], "date_string": "1 May", "enable_thinking": False},
}
PROGRAMS = {
    # Comments that eat white space, indented JSON, a default by `is defined`.
    "llama3": """\
{#- The date may be given -#}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul" %}
{%- endif %}
{%- if not tools is defined %}{% set tools = none %}{% endif -%}
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set first = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set first = "" %}
{%- endif %}
{{- "<h>system</h>\\n\\n" ~ "Today: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- first }}<end>
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<h>' + message['role'] + '</h>\\n\\n' }}
        {{- message['content'] | trim + '<end>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("One call at a time!") }}
        {%- endif %}
    {%- else %}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<h>assistant</h>\\n\\n' }}
{%- endif %}
""",
    # Backwards slices, namespaces, splitting and stripping, neighbours in a loop.
    "qwen3": """\
{%- if tools %}
    {{- '<s>system\\n' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><end>\\n" }}
{%- endif %}
{%- set ns = namespace(multi=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi and message.role == "user" and message.content is string
        and not(message.content.startswith('<r>')
        and message.content.endswith('</r>')) %}
        {%- set ns.multi = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if message.role == "assistant" %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set part = content.split('</think>')[0].rstrip('\\n') %}
            {%- set thought = part.split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<s>assistant\\n<think>' + thought.strip('\\n') }}
            {{- '</think>' + content }}
        {%- else %}
            {{- '<s>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- if (loop.first and content) or (not loop.first) %}
                {{- '\\n' }}
            {%- endif %}
            {%- if call.function %}{%- set call = call.function %}{%- endif %}
            {{- '<call>{"name": "' ~ call.name ~ '", "arguments": ' }}
            {%- if call.arguments is string %}
                {{- call.arguments }}
            {%- else %}
                {{- call.arguments | tojson }}
            {%- endif %}
            {{- '}</call>' }}
        {%- endfor %}
        {{- '<end>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<s>user' }}
        {%- endif %}
        {{- '\\n<r>\\n' + content + '\\n</r>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<end>\\n' }}
        {%- endif %}
    {%- else %}
        {{- '<s>' + message.role + '\\n' + content + '<end>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<s>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
""",
    # Filters over lists, macros, dictionaries in sorted order, refusals.
    "mistral": """\
{%- macro shown(tool) -%}
    {{- '{' }}
    {%- for key, value in tool.function.items() if key != "return" %}
        {%- if value is string %}
            {{- '"' + key + '": "' + value + '"' }}
        {%- else %}
            {{- '"' + key + '": ' + value|tojson }}
        {%- endif %}
        {%- if not loop.last %}{{- ", " }}{% endif %}
    {%- endfor %}
    {{- '}' }}
{%- endmacro -%}
{%- set loop_messages = messages | rejectattr("role", "equalto", "system") | list %}
{%- set users = loop_messages | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == users[-1]) %}
            {{- "[TOOLS] [" ~ tools | map(attribute="function.name") | join(", ") }}
            {%- for tool in tools %}{{ shown(tool) }}{% endfor %}
            {{- "]" }}
        {%- endif %}
        {{- "[INST] " + message.content + "[/INST]" }}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {%- for call in message.tool_calls %}
            {%- for k, v in call.function | dictsort %}{{ k ~ "=" ~ v }};{% endfor %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token }}
    {%- elif message["role"] in ["tool", "tool_results"] %}
        {{- '[R] {"content": ' + message.content|string + "}" }}
    {%- else %}
        {{- raise_exception("Only user, assistant and tool; not " ~ message.role) }}
    {%- endif %}
{%- endfor %}
""",
    # Without dashes: lines and indents that trim_blocks and lstrip_blocks take away.
    "gemma": """\
{{ bos_token }}
{% if messages[0]['role'] == 'system' %}
    {% set prefix = messages[0]['content'] ~ '\n\n' %}
    {% set turns = messages[1:] %}
{% else %}
    {% set prefix = "" %}
    {% set turns = messages %}
{% endif %}
{% for message in turns %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception("Roles must alternate user/assistant/user/…") }}
    {% endif %}
    {% if (message['role'] == 'assistant') %}
        {% set role = "model" %}
    {% else %}
        {% set role = message['role'] %}
    {% endif %}
    <start>{{ role }}
{{ (prefix if loop.first else "") + message['content'] | trim }}<end>
{% endfor %}
{% if add_generation_prompt %}<start>model
{% endif %}
""",
    # On one line, attributes of either kind, undefined names, loop controls.
    "deepseek": (
        "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = "
        "false %}{% endif %}{% set ns = namespace(tool=false, front='') %}"
        "{%- for message in messages %}{%- if message['role'] == 'system' %}"
        "{% set ns.front = message['content'] %}{%- endif %}{%- endfor %}"
        "{{bos_token}}{{ns.front}}{%- for message in messages %}"
        "{%- if message['role'] == 'system' %}{% continue %}{% endif %}"
        "{%- if message['role'] == 'user' %}{%- set ns.tool = false -%}"
        "{{'<User>' + message['content']}}{%- endif %}"
        "{%- if message['role'] == 'assistant' and message['tool_calls'] %}"
        "{%- for call in message['tool_calls'] %}{{ loop.index ~ call['type'] ~ "
        "call['function']['name'] ~ call.function.arguments['q'] }}{%- endfor %}"
        "{%- elif message['role'] == 'assistant' %}{% set c = message['content'] %}"
        "{% if '</think>' in c %}{% set c = c.split('</think>')[-1] %}{% endif %}"
        "{{'<Assistant>' + c + eos_token}}{%- endif %}"
        "{%- if message['role'] == 'tool' %}{%- set ns.tool = true -%}"
        "{{ message.name | default('?') | upper }}{{ missing }}{%- endif %}"
        "{%- if loop.index > 9 %}{% break %}{% endif %}{%- endfor -%}"
        "{% if add_generation_prompt and not ns.tool %}{{'<Assistant>'}}{% endif %}"
    ),
    # Numbers, tests, replacements, conditions in expressions, filters with blocks.
    "granite": """\
{%- set roles = {'user': 'U', 'assistant': 'A', 'system': 'S'} -%}
{%- for m in messages -%}
{%- set tag = roles.get(m.role, m.role | capitalize) -%}
[{{ '%02d' | format(loop.index) }}/{{ loop.length }}{{ ' first' if loop.first }}]
{%- generation %}{{ tag }}: {{ m.content | replace('\\n', ' ') | indent(2) }}
{%- endgeneration %}
{%- if loop.previtem is defined and loop.previtem.role == m.role %} again{% endif %}
{{ m.content | length }} {{ 7 // 2 }} {{ 7 / 2 }} {{ true }} {{ none }} {{ [1, 'é'] }}
{% filter trim %}  {{ m | tojson(indent=2, sort_keys=True) }}  {% endfilter %}
{% raw %}{{ raw }}{% endraw %}
{% endfor %}
{{ tools | tojson(ensure_ascii=True) }} {{ tools | tojson(separators=(',', ':')) }}
""",
}


def main() -> None:
    made = tk.Tokenizer(tk.models.WordLevel({"<begin>": 0, "<fin>": 1}, "<begin>"))
    reader = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<begin>", eos_token="<fin>"
    )
    rendered = {}
    for name, program in PROGRAMS.items():
        for talk, messages in CONVERSATIONS.items():
            for given, variables in VARIABLES.items():
                values = {"add_generation_prompt": True, **variables}
                found = {}
                try:
                    found["text"] = reader.apply_chat_template(
                        messages, chat_template=program, tokenize=False, **values
                    )
                except Exception as error:
                    found["error"] = str(error)
                rendered[f"{name}, {talk}, {given}"] = found
    found = {
        "tokens": {"bos_token": "<begin>", "eos_token": "<fin>"},
        "programs": PROGRAMS,
        "conversations": CONVERSATIONS,
        "variables": VARIABLES,
        "rendered": rendered,
    }
    text = json.dumps(found, ensure_ascii=False, separators=(",", ":"))
    FILE.write_text(text + "\n", encoding="utf-8")
    print({k: v["error"] for k, v in rendered.items() if "error" in v})


if __name__ == "__main__":
    main()
