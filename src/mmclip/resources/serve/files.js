// Downloads: a table of all answers, and a picture of what the stage shows.

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

// A text that a spreadsheet shows and does not run: an apostrophe stands before a formula.
const safe = (text) => (/^[\t\r\n]|^\s*[=+\-@＝＋－＠]/.test(text) ? `'${text}` : text);
const cell = (text) => (/[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);

// The table that `mmclip predict` writes: the image, then a column for each finding.
export function saveCsv(images, findings) {
  const lines = [["image_id", ...findings].map(safe).map(cell).join(",")];
  for (const image of images) {
    const values = findings.map((name) => String(image.scores.get(name)?.probability ?? ""));
    lines.push([cell(safe(image.name)), ...values].join(","));
  }
  save(new Blob([`${lines.join("\n")}\n`], { type: "text/csv" }), "predictions.csv");
}

export function savePng(drawn, size, overlay, strength, lines, name) {
  const [width, height] = size;
  const scale = Math.max(1, Math.ceil(640 / width));
  const font = Math.max(13, Math.round((width * scale) / 60));
  const footer = Math.round(font * (1.5 * lines.length + 1));
  const canvas = document.createElement("canvas");
  canvas.width = width * scale;
  canvas.height = height * scale + footer;
  const context = canvas.getContext("2d");
  context.fillStyle = "#14191f";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(drawn, 0, 0, width * scale, height * scale);
  if (overlay) {
    context.globalAlpha = strength;
    context.imageSmoothingEnabled = false;
    context.drawImage(overlay, 0, 0, width * scale, height * scale);
    context.globalAlpha = 1;
  }
  context.textBaseline = "top";
  lines.forEach((line, i) => {
    context.fillStyle = i ? "#aab4bf" : "#f3f5f7";
    context.font = `${i ? "" : "600 "}${font}px system-ui, sans-serif`;
    context.fillText(line, font, height * scale + font * (0.8 + 1.5 * i), canvas.width - 2 * font);
  });
  canvas.toBlob((blob) => save(blob, name), "image/png");
}
