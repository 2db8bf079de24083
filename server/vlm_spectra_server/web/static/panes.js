// Where the tokens of a prompt's images look. An image has a pane for its own grid, and another for each overview; tokens
// that look at the same pixels are one cell.

export function panesOf(prompt) {
  const several = prompt.images.length > 1;
  return prompt.images.flatMap((image, number) => image.panes.map(({ name, patches }) => ({
    image: number,
    name: [several ? `image ${number + 1}` : "", name].filter(Boolean).join(", "),
    size: image.size,
    cells: cellsOf(patches),
  })));
}

function cellsOf(patches) {
  const cells = new Map();
  for (const { position, row, column, box } of patches) {
    const there = cells.get(String(box));
    if (there) there.positions.push(position);
    else cells.set(String(box), { positions: [position], row, column, box });
  }
  return [...cells.values()];
}

/** What a cell has of values by position. */
export const sum = (cell, value) => cell.positions.reduce((whole, position) => whole + (value(position) || 0), 0);

/** The number of the cell at each pixel of a small picture of a pane, -1 where there is none. */
export function cellMap({ size, cells }, width, height) {
  const map = new Int32Array(width * height).fill(-1);
  cells.forEach(({ box: [left, top, right, bottom] }, number) => {
    const [x, end] = [left, right].map((edge) => Math.round((edge / size[0]) * width));
    for (let y = Math.round((top / size[1]) * height), last = Math.round((bottom / size[1]) * height); y < last; y++)
      map.fill(number, y * width + x, y * width + end);
  });
  return map;
}
