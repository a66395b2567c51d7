// Patterns over dotted names, with the meaning of flex_model/core/naming/globs.py: `*` and `?` stay within one part,
// `**` crosses dots, `[01]` is a set. Throws where Python's does.
const isGlob = (pattern) => /[*?[]/.test(pattern);

function globToRegExp(pattern) {
  const tokens = pattern.match(/\*\*|\*|\?|\[(?![!^]?\])[^\]]+\]|[^\n]/gu) ?? [];
  const out = tokens.map((token) => {
    if (token === "**") return "[^\\n]*";
    if (token === "*") return "[^.]*";
    if (token === "?") return "[^.]";
    if (token.startsWith("[") && token.length > 1) {
      return `[${token.slice(1, -1).replace(/[\\[]/g, "\\$&").replace(/^!/, "^")}]`;
    }
    return token.replace(/[\\^$.*+?()[\]{}|/]/gu, "\\$&");
  });
  return new RegExp(`^(?:${out.join("")})$`, "u");
}
