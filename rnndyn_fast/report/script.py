"""The script of the reports: tables are sorted by a click, or Enter, on the heading of a column, and say so where they are cut off."""

# Without scripts the tables are as they are. Missing values (a dash) stay last in either order.
SCRIPT = r"""
(function () {
  function value(row, k) {
    var text = row.cells[k].textContent.trim();
    var number = parseFloat(text.replace(/,/g, '').replace(/\u2212/g, '-'));
    return { missing: text === '' || text === '\u2013', number: number, text: text };
  }
  function compare(a, b) {
    if (isFinite(a.number) && isFinite(b.number) && a.number !== b.number) return a.number - b.number;
    return a.text.localeCompare(b.text, undefined, { numeric: true });
  }
  function mark() {
    document.querySelectorAll('.table').forEach(function (box) {
      box.classList.toggle('wide', box.scrollWidth > box.clientWidth + 1);
    });
  }
  mark();
  window.addEventListener('resize', mark);
  document.querySelectorAll('table').forEach(function (table) {
    var body = table.tBodies[0], heads = Array.prototype.slice.call(table.tHead.rows[0].cells);
    if (body.rows.length < 2) return;
    heads.forEach(function (head, k) {
      var button = document.createElement('button');
      button.type = 'button';
      button.title = 'Sort by this column';
      while (head.firstChild) button.appendChild(head.firstChild);
      head.appendChild(button);
      button.addEventListener('click', function () {
        var down = head.getAttribute('aria-sort') === 'ascending';
        heads.forEach(function (other) { other.removeAttribute('aria-sort'); });
        head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
        var rows = Array.prototype.map.call(body.rows, function (row) { return { row: row, key: value(row, k) }; });
        rows.sort(function (a, b) {
          if (a.key.missing !== b.key.missing) return a.key.missing ? 1 : -1;
          return down ? -compare(a.key, b.key) : compare(a.key, b.key);
        });
        rows.forEach(function (item) { body.appendChild(item.row); });
      });
    });
  });
})();
"""
