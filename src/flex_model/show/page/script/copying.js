// Code that hooks a module, and copying it.
const python = (text) => JSON.stringify(text);
const literal = (name) => name.replace(/[*?[]/g, "[$&]");  // of a name where patterns are taken
const REGISTER = {out: "register_forward_hook", in: "register_forward_pre_hook"};

const capturing = (key, options, read) => `with fm.capture(${key}${options}) as acts:\n    fm(**inputs)\n${read}`;

// [title, code] of a module's value: ``side`` in or out, ``index`` among its tensors.
function snippets(name, side, index) {
  const options = (side === "in" ? ', hook_type="forward_pre"' : "") + (index ? `, unpack_idx=${index}` : "");
  const key = python(literal(name));
  return [
    ["Capture", capturing(key, options, `acts[${literal(name) === name ? key : python(name)}]`)],
    ["Edit", `with fm.edit(${key}, lambda x: x * 2${options}):\n    fm(**inputs)`],
    ["Register", `hook = HookFunction(\n    ${python(name)},\n    editing_function=lambda x: x * 2,\n` +
      `${index ? `    unpack_idx=${index},\n` : ""})\nhandle = fm.${REGISTER[side]}(hook)`],
  ];
}

// The clipboard of the browser, or where that is refused (file://, frames) a selection and the old command.
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyOld(text);
  }
}

function copyOld(text) {
  const area = h("textarea", {class: "offscreen", "aria-hidden": "true", tabindex: "-1"});
  area.value = text;
  const before = document.activeElement;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  before?.focus();
  return done;
}

function copyButton(title, text, label = "Copy") {
  const button = h("button", {type: "button", class: "copy", "aria-label": `Copy: ${title}`}, label);
  button.addEventListener("click", async () => {
    const done = await copy(text());
    say(done ? `Copied: ${title}` : "The browser refuses to copy; select the code and copy it");
    button.textContent = done ? "Copied ✓" : "Not copied";
    setTimeout(() => { button.textContent = label; }, 2000);
  });
  return button;
}

const codeBox = (title, code) => h("div", {class: "code"},
  h("div", {class: "bar"}, title, copyButton(title, () => code)), h("pre", {tabindex: "0"}, code));

function codeOf(module) {
  const sites = module.values.length ? outFirst(module.values) : [{side: "out", index: 0}];
  const options = sites.map((value, i) => h("option", {value: i}, siteName(value)));
  const choice = h("select", {"aria-label": "Value to hook"}, options);
  const list = h("div", {class: "codes"});
  const draw = () => {
    const site = sites[Number(choice.value)];
    const found = snippets(module.name, site.side, site.index ?? 0);
    list.replaceChildren(...found.map(([title, code]) => codeBox(title, code)));
  };
  choice.addEventListener("change", draw);
  draw();
  return h("section", {class: "block"}, h("h3", null, "Code", sites.length > 1 ? choice : null), list);
}
