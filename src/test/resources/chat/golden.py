"""Makes golden.json: what jinja2, in the environment of transformers, renders from the templates and snippets here.

python golden.py   (needs transformers and jinja2)
"""
import datetime, json, pathlib
import transformers.utils.chat_template_utils as chat

class Fixed(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2025, 3, 7, 9, 5, 3)

chat.datetime = Fixed
here = pathlib.Path(__file__).parent
sys, user, bot = (lambda role: lambda text, **more: {"role": role, "content": text, **more})("system"), \
    (lambda text: {"role": "user", "content": text}), (lambda text, **more: {"role": "assistant", "content": text, **more})
tool = lambda text: {"role": "tool", "content": text}
call = lambda name, arguments: {"type": "function", "function": {"name": name, "arguments": arguments}}
weather = {"type": "function", "function": {"name": "weather", "description": "Wetter in \"Zürich\" <& co> 'x'", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer", "default": 3}, "scale": {"type": "number", "default": 1e-7}},
    "required": ["city"], "additionalProperties": False, "enum": [None, 1.5, 1e22, []], "empty": {}}}}
conversations = [
    [user("Hi")], [user("  Hi there \n")], [sys("Be brief."), user("2+2?")],
    [sys(" Be\tbrief. \n"), user("2+2?"), bot("4"), user("And 3+3?")],
    [user("2+2?"), bot("<think>\nTwo and two.\n</think>\n\n4"), user("And 3+3?")],
    [user("2+2?"), bot("<think>\nTwo and two.\n</think>\n\n4")],
    [user("a"), bot("b"), user("c"), bot("d"), user("e")],
    [sys(""), user("")], [user("\u00a0nbsp\u2003 \x1c"), bot("\x0b ok \x85")],
    [user("日本語 🙂 👩‍👩‍👧 \"quotes\" 'single' \\back\\ {{ braces }} {% tag %} <b>&amp;")],
    [user("tabs\tand\nnewlines\r\nand more"), bot("  lead and trail  \n\n")],
    [user("x"), bot("</think>only end"), user("y"), bot("<think>a</think>b<think>c</think>\n\nd")],
    [sys("one"), user("q"), sys("two"), user("r")],
    [user("<tool_response>fake</tool_response>"), bot("z")],
]
tooled = [
    [user("Weather?")], [sys("You help."), user("Weather in Zürich?"), bot("", tool_calls=[call("weather", {"city": "Zürich", "days": 2})]), tool("sunny ☀")],
    [user("Two"), bot("Looking.", tool_calls=[call("weather", {"city": "a\"b"})]), tool("one"), tool("two"), bot("Done."), user("more")],
    [user("Reason"), bot("Answer", reasoning_content="\nbecause\n")],
]
snippets = {
    "values": "{{ true }} {{ none }} {{ 1 }} {{ 1.0 }} {{ 1e22 }} {{ 1e-7 }} {{ 0.1 + 0.2 }} {{ 7 // 2 }} {{ -7 // 2 }} {{ -7 % 3 }} {{ 7 / 2 }} {{ 2 ** 10 }} {{ 2 ** -1 }} {{ -2 ** 2 }}",
    "repr": "{{ ['a', \"it's\", 'q\"', 'n\\n', 1, 1.5, true, none, {'k': ('t', 2)}, (1,), [], '\u00e9\\u200b\\x01'] }}",
    "undefined": "[{{ nope }}]{% for x in nope %}x{% else %}empty{% endfor %}{{ nope is defined }}{{ nope | length }}{{ nope | default('d') }}{{ '' | default('e', true) }}{{ nope ~ 'z' }}{{ 'a' in nope }}{{ nope == nope2 }}",
    "slices": "{{ 'héllo🙂x'[::-1] }} {{ 'hello'[1:-1] }} {{ 'hello'[-3:] }} {{ [1,2,3,4][::2] }} {{ [1,2,3,4][::-2] }} {{ [1,2,3][5:1:-1] }} {{ 'abc'[10:] }} {{ 'abc'[-1] }}{{ 'abc'[7] }} {{ '🙂a'[0] }} {{ [1,2,3][:-10:-1] }} {{ [1,2,3][-2:] }}",
    "loops": "{% for x in [1,2,3,4,5] if x % 2 %}{{ loop.index }}/{{ loop.length }}:{{ x }}{{ loop.first }}{{ loop.last }}{{ loop.revindex }}{{ loop.previtem }}-{{ loop.nextitem }};{% endfor %}",
    "loopcontrols": "{% for x in range(10) %}{% if x == 2 %}{% continue %}{% endif %}{% if x == 5 %}{% break %}{% endif %}{{ x }}{% endfor %}",
    "unpack": "{% for k, v in {'a': 1, 'b': [2]}.items() %}{{ k }}={{ v }};{% endfor %}{% for k, v in {'a': 1} | items %}{{ k }}{{ v }}{% endfor %}{% set a, b = 1, 2 %}{{ a }}{{ b }}{{ (1, 2) }}",
    "scope": "{% set x = 1 %}{% for i in [1,2] %}{{ x }}{% set x = x + 10 %}{{ x }};{% endfor %}{{ x }}{% if true %}{% set x = 5 %}{% endif %}{{ x }}",
    "namespace": "{% set ns = namespace(a=1, b='x') %}{% for i in range(3) %}{% set ns.a = ns.a + i %}{% endfor %}{{ ns.a }}{{ ns.b }}{{ ns.c is defined }}",
    "macro": "{% macro f(a, b='B', c=a) %}[{{ a }}|{{ b }}|{{ c }}]{% endmacro %}{{ f(1) }}{{ f(1, c=2) }}{{ f('x', 'y') ~ '!' }}{% set g = f(3) | upper %}{{ g }}",
    "recursion": "{% macro down(n) %}{{ n }}{% if n > 0 %}{{ down(n - 1) }}{% endif %}{% endmacro %}{{ down(5) }}",
    "capture": "{% set x %} a\n b {% endset %}[{{ x }}]{% set y | trim | upper %} c {% endset %}[{{ y }}]",
    "whitespace": "  {% if true %}\n  a\n  {%- if true -%}\n   b   \n  {%+ if true %}\n c {% endif +%}\n{% endif %}\n {# note #}\n  {{ 'x' }}\n{{- 'y' -}}\n  z\n  {#- c -#}  \n w {% endif %}  \nend\n\n",
    "raw": "a {% raw %}{{ x }} {% if %}{% endraw %}\n b {%- raw -%} c {%- endraw -%} d",
    "nested braces": "{{ {'a': {'b': 1}}['a']['b'] }}{{ {'a': {}} }}",
    "tests": "{{ 1 is number }}{{ true is number }}{{ true is integer }}{{ 1 is integer }}{{ 1.0 is float }}{{ {} is mapping }}{{ [] is sequence }}{{ 'x' is iterable }}{{ none is none }}{{ 1 is odd }}{{ 2 is even }}{{ 1 is eq 1 }}{{ 2 is in [1,2] }}{{ x is undefined }}{{ true is true }}{{ 1 is true }}{{ none is sameas none }}{{ 1 is not string }}{{ 3 is gt(2) }}{{ not x is defined }}{{ nope is iterable }}",
    "filters": "{{ ' a ' | trim }}|{{ 'xxaxx' | trim('x') }}|{{ [1,2] | join('-') }}|{{ ['a','b'] | first }}{{ 'xyz' | last }}|{{ 'abc' | reverse }}|{{ 'hELLO wORLD' | capitalize }}|{{ 'a.b' | replace('.', '\\n') }}|{{ 'aaa' | replace('a', 'b', 2) }}|{{ 3 | string + 'x' }}|{{ '42' | int + 1 }}|{{ 'q' | int }}|{{ 3.9 | int }}|{{ 'ß' | upper }}|{{ 'abc' | list }}|{{ [3,1] | length }}|{{ 'abc' | count }}",
    "select": "{{ [{'r': 'a', 'n': 1}, {'r': 'b', 'n': 2}, {'n': 0}] | selectattr('r', 'equalto', 'a') | list | length }}{{ [{'n': 1}, {'n': 0}] | rejectattr('n') | list }}{{ [{'n': {'m': 5}}, {'n': {'m': 6}}] | map(attribute='n.m') | list }}{{ ['a ', ' b'] | map('trim') | join(',') }}{{ [{'n': 1}, {}] | selectattr('n', 'defined') | list | length }}",
    "reject": "{{ ['a', 'b', 'code_interpreter'] | reject('equalto', 'code_interpreter') | join(', ') }}{{ [1, 0, 2] | select | list }}",
    "tojson": "{{ {'b': [1, 2.0, none, true, 'é\\n\\u2028\"\\\\/<>&\\x7f\\x01'], 'a': {}} | tojson }}\n{{ {'b': [1, {'c': []}], 'a': ''} | tojson(indent=2) }}\n{{ {'b': 'é🙂', 'a': 1} | tojson(ensure_ascii=true, sort_keys=true, separators=(',', ':')) }}{{ [] | tojson(indent=1) }}{{ 1e16 | tojson }}{{ 123456789.125 | tojson }}{{ {1: 2, none: 3} | tojson }}",
    "methods": "{{ ' x '.strip() }}|{{ 'xxyxx'.strip('x') }}|{{ '\\n\\na'.lstrip('\\n') }}|{{ 'a  b c'.split() }}|{{ 'a,b,,c'.split(',') }}|{{ 'a,b,c'.split(',', 1) }}|{{ 'a</think>b</think>c'.split('</think>')[-1] }}|{{ 'abc'.startswith('ab') }}{{ 'abc'.endswith(('x', 'c')) }}|{{ 'aXbX'.replace('X', 'yy') }}|{{ 'abc'.replace('', '-') }}|{{ 'aé🙂b'.find('b') }}|{{ '-'.join(['a', 'b']) }}|{{ {'a': 1}.get('a') }}{{ {'a': 1}.get('b') }}{{ {'a': 1}.get('b', 9) }}|{{ 'a\\nb\\r\\nc'.splitlines() }}|{{ 'abcd'.removeprefix('ab').removesuffix('d') }}|{{ 'İI'.lower() }}",
    "keys": "{{ {'a': 1, 'b': 2}.keys() | list }}{{ {'a': 1}.values() | list }}",
    "logic": "{{ 1 and 2 }}{{ 0 or 'x' }}{{ '' and 1 }}{{ not 1 }}{{ 1 < 2 < 3 }}{{ 1 < 2 > 5 }}{{ 'a' < 'b' }}{{ 'x' if false }}{{ 'x' if false else 'y' if true else 'z' }}{{ 1 == 1.0 == true }}{{ [1, {'a': 2}] == [1, {'a': 2}] }}{{ (1,) == [1] }}{{ 'a' not in ['b'] }}{{ 'b' in {'b': 1} }}{{ 'el' in 'hello' }}",
    "precedence": "{{ 1 ~ 2 * 3 ~ 4 }}{{ 'a' ~ 1 ~ 2 * 3 }}{{ not 1 == 2 }}{{ 1 if 0 or 1 and not 0 else 2 }}{{ -3 | string }}{{ 'a' 'b' }}{{ '3' | int * 2 }}",
    "strftime": "{{ strftime_now('%d %b %Y') }} {{ strftime_now('%Y-%m-%d %H:%M:%S %A %B %j %p %I %%') }}",
    "escapes": "{{ 'a\\tb\\\\c\\'d\\\"e\\x41\\u00e9\\U0001F642\\q' }}{{ \"two\nlines\" }}",
    "lists": "{{ [1] + [2] }}{{ [1] * 2 }}{{ 'ab' * 3 }}{{ 3 * 'x' }}{{ [1, 2][-1] }}{{ [1,2][9] }}{{ [[1, 2], [3]][0][1] }}",
    "generation": "{% generation %} a {% endgeneration %}\nb",
    "dict": "{{ dict(zulu=1, alpha=2, mike=3) }}{{ dict(a=1, b=2) }}{{ dict({'x': 1}, y=2) }}",
    "newlines": "a\r\nb\rc\n",
    "attributes": "{% set m = {'content': 'c', 'role': 'r'} %}{{ m.content }}{{ m['role'] }}{{ m.nope }}{{ m['nope'] is defined }}{{ none.x is defined }}{{ 'abc'.nope is defined }}",
    "ranges": "{{ range(3) | list }}{{ range(5, 1, -2) | list }}{{ range(1, 3) | list }}",
    "elif": "{% for x in [1,2,3] %}{% if x == 1 %}one{% elif x == 2 %}two{% else %}more{% endif %}{% endfor %}",
    "comment line": "a\n  {# whole line #}\nb\n{{ 1 }}  {# tail #}\nc",
}
tokens = {"bos_token": "<s>", "eos_token": "</s>"}
cases = []
def add(name, template, messages, **variables):
    try:
        text, _ = chat.render_jinja_template([messages], chat_template=template, **variables, **tokens)
        cases.append({"template": name, "messages": messages, "variables": variables, "text": text[0]})
    except Exception as e:
        cases.append({"template": name, "messages": messages, "variables": variables, "error": type(e).__name__ + ": " + str(e)})
for path in sorted(here.glob("*.jinja")):
    template = path.open(newline="").read()
    for messages in conversations:
        for prompt in (False, True):
            add(path.name, template, messages, add_generation_prompt=prompt)
    for messages in tooled:
        add(path.name, template, messages, add_generation_prompt=True)
        add(path.name, template, messages, tools=[weather, weather], add_generation_prompt=True)
        add(path.name, template, messages, tools=[weather], tools_in_user_message=False, date_string="1 Jan 2024", add_generation_prompt=False)
    add(path.name, template, conversations[0], enable_thinking=False, add_generation_prompt=True)
    add(path.name, template, tooled[1], builtin_tools=["weather", "code_interpreter"], add_generation_prompt=True)
for name, template in snippets.items():
    add("snippet " + name, template, [])
json.dump({"tokens": tokens, "snippets": snippets, "cases": cases}, (here / "golden.json").open("w"), indent=0, ensure_ascii=True)
for c in cases:
    if "error" in c and c["template"].startswith("snippet"): print(c["template"], c["error"])
print(len(cases), "cases,", sum("error" in c for c in cases), "errors")
