// Requests to the server that sent this page, and to no other.

let token = "";
try { token = sessionStorage.getItem("token") ?? ""; } catch { /* storage may be off */ }

export class Refused extends Error {
  constructor(message, status) { super(message); this.status = status; }
}

function askToken() {
  const dialog = document.getElementById("token-dialog");
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      token = document.getElementById("token").value.trim();
      try { sessionStorage.setItem("token", token); } catch { /* storage may be off */ }
      resolve();
    }, { once: true });
    if (!dialog.open) dialog.showModal();
  });
}

async function request(path, options = {}) {
  for (;;) {
    const headers = { ...(options.headers ?? {}) };
    if (token) headers.Authorization = `Bearer ${token}`;
    let answer;
    try {
      answer = await fetch(path, { ...options, headers });
    } catch {
      throw new Refused("The server does not answer: is `mmclip serve` still running?", 0);
    }
    if (answer.status === 401) { await askToken(); continue; }
    if (answer.status === 429) {
      const wait = Number(answer.headers.get("Retry-After") ?? 1);
      await new Promise((resolve) => setTimeout(resolve, 1000 * Math.min(wait, 10)));
      continue;
    }
    if (!answer.ok) {
      let said = `The server answers ${answer.status}.`;
      try { said = (await answer.json()).error ?? said; } catch { /* no JSON */ }
      throw new Refused(said, answer.status);
    }
    return answer;
  }
}

export const getJson = async (path) => (await request(path)).json();

export function post(path, fields) {
  const body = new FormData();
  for (const [name, value] of fields) body.append(name, value);
  return request(path, { method: "POST", body });
}

export const postJson = async (path, fields) => (await post(path, fields)).json();
