package dev.tandem.generation;

import static java.nio.charset.StandardCharsets.UTF_8;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertNull;
import static org.junit.jupiter.api.Assertions.assertTrue;

import java.io.ByteArrayOutputStream;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.Random;
import org.junit.jupiter.api.Test;

class StreamingTextTest {
    /** A token is up to three bytes, as in a byte-level vocabulary. A space in front appears only behind another token. */
    private static final class Bytes implements TokenDecoder {
        final List<byte[]> vocabulary = new ArrayList<>();
        int mostDecoded;

        int[] tokens(byte[]... pieces) {
            int[] ids = new int[pieces.length];
            for (int i = 0; i < pieces.length; i++) {
                ids[i] = vocabulary.size();
                vocabulary.add(pieces[i]);
            }
            return ids;
        }

        @Override
        public String decode(int[] tokens, int from, int to) {
            mostDecoded = Math.max(mostDecoded, to - from);
            var bytes = new ByteArrayOutputStream();
            for (int i = from; i < to; i++) {
                bytes.writeBytes(vocabulary.get(tokens[i]));
            }
            String text = bytes.toString(UTF_8);
            return text.startsWith(" ") ? text.substring(1) : text;
        }
    }

    private static byte[][] split(byte[] bytes, Random random) {
        List<byte[]> pieces = new ArrayList<>();
        for (int from = 0; from < bytes.length; ) {
            int to = Math.min(bytes.length, from + 1 + random.nextInt(3));
            pieces.add(Arrays.copyOfRange(bytes, from, to));
            from = to;
        }
        return pieces.toArray(byte[][]::new);
    }

    private static List<String> stream(Bytes decoder, int[] tokens, int promptLength) {
        var detokenizer = new IncrementalDetokenizer(decoder, promptLength);
        List<String> parts = new ArrayList<>();
        for (int count = promptLength + 1; count <= tokens.length; count++) {
            parts.add(detokenizer.append(tokens, count));
        }
        parts.add(detokenizer.flush(tokens, tokens.length));
        return parts;
    }

    @Test
    void incompleteUtf8IsHeldBackUntilItIsComplete() {
        Bytes decoder = new Bytes();
        byte[] smile = "😀".getBytes(UTF_8);
        int[] tokens = decoder.tokens("a".getBytes(UTF_8), " b".getBytes(UTF_8), Arrays.copyOf(smile, 1), Arrays.copyOfRange(smile, 1, 3),
                Arrays.copyOfRange(smile, 3, 4), "c".getBytes(UTF_8), Arrays.copyOf(smile, 2));
        assertEquals(List.of(" b", "", "", "😀", "c", "", "\uFFFD"), stream(decoder, tokens, 1));
    }

    @Test
    void aPromptThatEndsAmidACharacterIsCompletedByTheFirstToken() {
        Bytes decoder = new Bytes();
        byte[] umlaut = "ü".getBytes(UTF_8);
        int[] tokens = decoder.tokens("x".getBytes(UTF_8), Arrays.copyOf(umlaut, 1), Arrays.copyOfRange(umlaut, 1, 2), "y".getBytes(UTF_8));
        assertEquals("üy", String.join("", stream(decoder, tokens, 2)));
    }

    @Test
    void partsJoinToTheWholeText() {
        long seed = new Random().nextLong();
        Random random = new Random(seed);
        for (int trial = 0; trial < 500; trial++) {
            var text = new StringBuilder("p");
            for (int i = random.nextInt(40); i >= 0; i--) {
                text.append(List.of("a", " b", "é", "漢", "😀", "👩‍👩‍👧", "\n").get(random.nextInt(7)));
            }
            Bytes decoder = new Bytes();
            int[] tokens = decoder.tokens(split(text.toString().getBytes(UTF_8), random));
            int prompt = 1;
            List<String> parts = stream(decoder, tokens, prompt);
            String shown = String.join("", parts);
            String all = decoder.decode(tokens, 0, tokens.length);
            assertTrue(all.endsWith(shown), "seed " + seed + ": " + all + " / " + shown);
            String prefix = decoder.decode(tokens, 0, prompt).replace("\uFFFD", "");
            assertEquals(all, prefix + shown, "seed " + seed);
        }
    }

    @Test
    void endlessInvalidBytesAreShownAndTheWindowStaysSmall() {
        Random random = new Random(3);
        byte[] bytes = new byte[4000];
        for (int i = 0; i < bytes.length; i++) {
            bytes[i] = (byte) (random.nextInt(50) == 0 ? 'a' : 0x80 + random.nextInt(0x40));
        }
        Bytes decoder = new Bytes();
        int[] tokens = decoder.tokens(split(bytes, random));
        String whole = decoder.decode(tokens, 1, tokens.length);
        decoder.mostDecoded = 0;
        assertEquals(whole, String.join("", stream(decoder, tokens, 1)));
        assertTrue(decoder.mostDecoded < 25, "decoded " + decoder.mostDecoded + " tokens at once");
    }

    @Test
    void aStopStringMaySpanTokens() {
        var stops = new StopStrings(List.of("</s>"));
        assertEquals("Hi", stops.append("Hi<"));
        assertEquals("", stops.append("/"));
        assertEquals("</b>", stops.append("b>"));
        assertNull(stops.matched());
        assertEquals("x", stops.append("x</"));
        assertEquals("", stops.append("s>tail"));
        assertEquals("</s>", stops.matched());
        assertEquals("", stops.append("more"));
        assertEquals("", stops.flush());
    }

    @Test
    void heldTextIsShownAtTheEnd() {
        var stops = new StopStrings(List.of("END"));
        assertEquals("the ", stops.append("the EN"));
        assertEquals("EN", stops.flush());
        assertNull(stops.matched());
    }

    @Test
    void theOutcomeDoesNotDependOnHowTextIsCut() {
        long seed = new Random().nextLong();
        Random random = new Random(seed);
        for (int trial = 0; trial < 3000; trial++) {
            String text = random.ints(random.nextInt(1, 30), 'a', 'd').collect(StringBuilder::new, StringBuilder::appendCodePoint,
                    StringBuilder::append).toString();
            List<String> list = new ArrayList<>();
            for (int i = random.nextInt(4); i > 0; i--) {
                list.add(random.ints(random.nextInt(1, 5), 'a', 'd').collect(StringBuilder::new, StringBuilder::appendCodePoint,
                        StringBuilder::append).toString());
            }
            // by definition: the first end of any stop string, the longest of those
            String expected = text;
            String expectedStop = null;
            for (int end = 1; end <= text.length() && expectedStop == null; end++) {
                for (String stop : list) {
                    if (text.substring(0, end).endsWith(stop) && (expectedStop == null || stop.length() > expectedStop.length())) {
                        expectedStop = stop;
                        expected = text.substring(0, end - stop.length());
                    }
                }
            }
            var stops = new StopStrings(list);
            var shown = new StringBuilder();
            for (int from = 0; from < text.length(); ) {
                int to = Math.min(text.length(), from + 1 + random.nextInt(6));
                shown.append(stops.append(text.substring(from, to)));
                from = to;
            }
            shown.append(stops.flush());
            String message = "seed " + seed + ": " + text + " " + list;
            assertEquals(expectedStop, stops.matched(), message);
            assertEquals(expected, shown.toString(), message);
        }
    }
}
