// Colours: as the system has them, or as chosen here.

const NAMES = ["auto", "light", "dark"];
let current = "auto";

function setTheme(name) {
  current = name;
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  const button = document.getElementById("theme");
  button.textContent = `Colours: ${name}`;
  button.setAttribute("aria-label", name === "auto" ? "Colours: as the system has them" : `Colours: ${name}`);
  try { localStorage.setItem("theme", name); } catch { /* storage may be off */ }
}

export function listenToTheme() {
  let saved = "auto";
  try { saved = localStorage.getItem("theme"); } catch { /* storage may be off */ }
  setTheme(NAMES.includes(saved) ? saved : "auto");
  document.getElementById("theme").addEventListener("click", () => {
    setTheme(NAMES[(NAMES.indexOf(current) + 1) % NAMES.length]);
  });
}
