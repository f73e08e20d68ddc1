// Tokens as text. What comes from a vocabulary is anybody's: nothing of it may move, hide or reorder what stands around it.

/** Bytes as text; those that are no part of a character are written like <0xE2>. */
function utf8(bytes) {
  const strict = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
  let text = "";
  for (let at = 0; at < bytes.length; ) {
    const lead = bytes[at], size = lead < 0x80 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
    try {
      text += strict.decode(Uint8Array.from(bytes.slice(at, at + size)));
      at += size;
    } catch {
      text += `<0x${lead.toString(16).toUpperCase().padStart(2, "0")}>`;
      at += 1;
    }
  }
  return text;
}

/** A run of tokens as it reads: bytes of several tokens may make one character. */
function passage(pieces) {
  let text = "", bytes = [];
  for (const piece of pieces) {
    if (Array.isArray(piece)) { bytes.push(...piece); continue; }
    text += utf8(bytes) + piece;
    bytes = [];
  }
  return text + utf8(bytes);
}

/** Text fit to be shown: line ends and tabs as signs, what is not printed (controls, marks of direction) as its number. */
const shown = (text) => text.replace(/\r?\n/g, "\u21b5").replace(/\t/g, "\u21e5")
  .replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Co}\p{Cn}\p{Cs}]/gu, (c) => `\\u{${c.codePointAt(0).toString(16)}}`);

/** A token by itself, in quotes, so that a blank in front of a word is seen. */
const quoted = (piece) => `'${shown(passage([piece]))}'`;
const wordsOf = (text) => make("code", { dir: "auto" }, text);
