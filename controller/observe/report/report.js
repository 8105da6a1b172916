const [tip, cursor] = ['tip', 'cursor'].map(id => document.getElementById(id));
function line(kind, text, color) {
  const element = tip.appendChild(document.createElement(kind));
  if (color) element.appendChild(document.createElement('i')).style.background = color;
  element.append(text);
}
for (const chart of document.querySelectorAll('[data-readout]')) {
  const {series, points} = JSON.parse(chart.dataset.readout);
  const plot = chart.querySelector('.background');
  chart.addEventListener('pointermove', event => {
    const frame = plot.getBoundingClientRect(), at = (event.clientX - frame.left) / frame.width;
    const away = ([place]) => Math.abs(place - at);
    const [place, step] = points.reduce((a, b) => away(b) < away(a) ? b : a);
    tip.replaceChildren();
    line('b', step);
    for (const [, own, index, text] of points)
      if (own === step) line('div', series[index][0] + ' ' + text, series[index][1]);
    const right = event.clientX + 16, left = right - tip.offsetWidth - 32;
    const x = right + tip.offsetWidth < innerWidth ? right : left;
    const y = Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8);
    Object.assign(tip.style, {left: x + 'px', top: y + 'px', visibility: 'visible'});
    Object.assign(cursor.style, {
      left: frame.left + place * frame.width + 'px', top: frame.top + 'px',
      height: frame.height + 'px', visibility: 'visible',
    });
  });
  chart.addEventListener('pointerleave', () => {
    tip.style.visibility = cursor.style.visibility = 'hidden';
  });
}
addEventListener('beforeprint', () => {
  for (const details of document.querySelectorAll('details')) details.open = true;
});
