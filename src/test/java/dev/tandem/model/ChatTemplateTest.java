package dev.tandem.model;

import static org.junit.jupiter.api.Assertions.assertAll;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import java.io.IOException;
import java.nio.file.Files;
import java.time.LocalDateTime;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.concurrent.Callable;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.function.Executable;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;

class ChatTemplateTest {
    private static final TemplateFunctions FIXED_TIME = new TemplateFunctions(() ->
            LocalDateTime.of(2025, 3, 7, 9, 5, 3));

    private static ChatTemplate template(String text) {
        return ChatTemplate.parse("test.jinja", text, Map.of());
    }

    private static String render(String text) {
        return template(text).render(List.of(), false);
    }

    /** golden.json holds what jinja2 rendered; golden.py beside it says how. */
    @Test
    void rendersWhatJinjaRenders() throws IOException {
        JsonObject golden = TestFiles.json("chat/golden.json");
        Map<String, String> tokens = new HashMap<>();
        golden.getAsJsonObject("tokens").entrySet().forEach(entry -> tokens.put(entry.getKey(),
                entry.getValue().getAsString()));
        Map<String, ChatTemplate> templates = new HashMap<>();
        List<Executable> checks = new ArrayList<>();
        for (JsonElement element : golden.getAsJsonArray("cases")) {
            JsonObject each = element.getAsJsonObject();
            String name = each.get("template").getAsString();
            if (!templates.containsKey(name)) {
                String text = name.startsWith("snippet ")
                        ? golden.getAsJsonObject("snippets").get(name.substring(8)).getAsString()
                        : Files.readString(TestFiles.resource("chat/" + name));
                templates.put(name, ChatTemplate.parse(name, text, tokens, FIXED_TIME));
            }
            Map<String, Object> variables = new LinkedHashMap<>();
            variables.put("messages", TestFiles.plain(each.get("messages")));
            each.getAsJsonObject("variables").entrySet().forEach(e -> variables.put(e.getKey(),
                    TestFiles.plain(e.getValue())));
            ChatTemplate template = templates.get(name);
            if (each.has("error")) {
                checks.add(() -> assertThrows(RuntimeException.class, () -> template.render(variables),
                        each.toString()));
            } else {
                checks.add(() -> assertEquals(each.get("text").getAsString(), template.render(variables), name
                        + variables));
            }
        }
        assertTrue(checks.size() > 350, "cases: " + checks.size());
        assertAll(checks);
    }

    @ParameterizedTest
    @CsvSource({"llama", "opt", "qwen2", "qwen3"})
    void rendersTheFixturesChats(String name) throws IOException {
        ChatTemplate template = TokenizerSettings.read(TestFiles.resource("fixtures/" + name)).chatTemplate();
        for (JsonElement element : TestFiles.json("fixtures/" + name + "/golden.json").getAsJsonArray("chat")) {
            JsonObject chat = element.getAsJsonObject();
            List<ChatMessage> messages = new ArrayList<>();
            chat.getAsJsonArray("messages").forEach(m -> messages.add(new ChatMessage(
                    m.getAsJsonObject().get("role").getAsString(), m.getAsJsonObject().get("content").getAsString())));
            assertEquals(chat.get("text").getAsString(),
                    template.render(messages, chat.get("add_generation_prompt").getAsBoolean()));
        }
    }

    @ParameterizedTest
    @CsvSource(delimiter = '#', value = {
        "{% include 'x' %} # unknown tag 'include'",
        "{{ x | frobnicate }} # unknown filter 'frobnicate'",
        "{{ x is frobnicated }} # unknown test 'frobnicated'",
        "{{ x.frobnicate() }} # unknown method .frobnicate()",
        "{{ frobnicate(1) }} # unknown function 'frobnicate'",
        "{% for x in y recursive %}{% endfor %} # recursive",
        "{{ x # a tag is not closed with }}",
        "{% if x %} # {% endif %}",
        "{{ 'x }} # a string is not closed",
        "{{ (1 }} # unexpected",
        "{{ 1 ? 2 }} # unexpected character '?'",
        "{% break %} # outside a loop",
        "{{ 99999999999999999999 }} # too large",
        "{% set loop = 1 %} # cannot be assigned",
    })
    void refusesUnknownConstructsWithTheirLine(String text, String problem) {
        String message = assertThrows(ModelFormatException.class, () -> template("a\n\n" + text)).getMessage();
        assertTrue(message.startsWith("test.jinja: chat template, line 3: ") && message.contains(problem), message);
    }

    @ParameterizedTest
    @CsvSource(delimiter = '#', value = {
        "{{ nope.x }} # 'nope' is undefined",
        "{{ 1 + 'a' }} # '+' is not supported between an integer and a string",
        "{{ 1 < 'a' }} # '<' is not supported",
        "{{ 1 // 0 }} # division by zero",
        "{{ 9000000000000000 * 9000000000000000 }} # overflow",
        "{{ [].items() }} # a list has no method .items()",
        "{{ {}.items }} # is not called",
        "{% for a, b in [1] %}{% endfor %} # cannot loop over an integer",
        "{% for a, b in [[1]] %}{% endfor %} # expected 2 values to unpack, found 1",
        "{{ 'x' | trim(1) }} # must be a string",
        "{{ 'x' | trim(nope=1) }} # unknown argument nope",
        "{{ loop.index }} # 'loop' is undefined",
        "{{ nope | tojson }} # 'nope' is undefined",
        "{{ 'x' * 999999999999 }} # characters of text",
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %} # more than",
        "{% set ns = namespace(x='aaaa') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %} # characters of text",
        "{% set ns = namespace(x=[]) %}{% for i in range(9999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }} # nested more than",
        "{% set ns = namespace(x=[]) %}{% for i in range(9999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x == [[]] }}{{ ns.x == ns.x }} # nested more than",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }} # nested more than",
        "{{ strftime_now('%Q') }} # unknown directive %Q",
    })
    void failsWithTheLine(String text, String problem) {
        ChatTemplate template = template("\n" + text);
        String message = assertThrows(ModelFormatException.class, () -> template.render(List.of(), false)).getMessage();
        assertTrue(message.startsWith("test.jinja: chat template, line 2: ") && message.contains(problem), message);
    }

    @Test
    void nestingIsLimited() {
        String deep = "{{ " + "(".repeat(5000) + "1" + ")".repeat(5000) + " }}";
        assertTrue(assertThrows(ModelFormatException.class, () -> template(deep)).getMessage().contains("nested"));
        String nots = "{{ " + "not ".repeat(100_000) + "1 }}";
        assertTrue(assertThrows(ModelFormatException.class, () -> template(nots)).getMessage().contains("nested"));
        String chain = "{{ 1" + " + 1".repeat(100_000) + " }}";
        assertTrue(assertThrows(ModelFormatException.class, () -> render(chain)).getMessage().contains("nested"));
        assertEquals("201", render("{{ 1" + " + 1".repeat(200) + " }}"));
    }

    @Test
    void raiseExceptionIsTheCallersMistake() {
        ChatTemplate template = template("{{ raise_exception('roles must alternate') }}");
        assertTrue(assertThrows(IllegalArgumentException.class, () -> template.render(List.of(), false)).getMessage()
                .contains("roles must alternate"));
    }

    @Test
    void threadsShareATemplate() throws Exception {
        ChatTemplate template = template("{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}");
        try (var pool = Executors.newFixedThreadPool(4)) {
            List<Callable<String>> calls = new ArrayList<>();
            for (int i = 0; i < 200; i++) {
                List<ChatMessage> messages = List.of(ChatMessage.user("a" + i), ChatMessage.assistant("b" + i));
                calls.add(() -> template.render(messages, true));
            }
            List<Future<String>> texts = pool.invokeAll(calls);
            for (int i = 0; i < texts.size(); i++) {
                assertEquals("1a" + i + "2b" + i, texts.get(i).get());
            }
        }
    }
}
