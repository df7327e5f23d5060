// Status: one line, which says how long a large task takes already.

const $ = (id) => document.getElementById(id);
const tasks = new Map();
let taskNumber = 0;

export function say(text, isBad = false) {
  $("status").className = isBad ? "status bad" : "status";
  $("status-text").textContent = text;
}

function showTask() {
  const task = [...tasks.values()].at(-1);
  if (!task) return;
  const seconds = Math.floor((performance.now() - task.began) / 1000);
  $("status").className = "status busy";
  $("status-text").textContent = seconds ? `${task.text}, ${seconds} s` : task.text;
}

export async function during(text, work) {
  const number = taskNumber++;
  tasks.set(number, { text, began: performance.now() });
  showTask();
  const timer = setInterval(showTask, 500);
  try {
    const found = await work();
    tasks.delete(number);
    if (tasks.size) showTask(); else say("Ready.");
    return found;
  } catch (error) {
    tasks.delete(number);
    say(error.message, true);
    return null;
  } finally {
    clearInterval(timer);
  }
}
