"""The page of report.html: one template with its style sheet; no script and nothing to fetch."""

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}: compressft report</title>
<style>
:root {
  --page: #f6f7f9; --card: #ffffff; --ink: #1a232e; --soft: #52606d; --line: #dde2e8; --accent: #1d5fa7;
}
@media (prefers-color-scheme: dark) {
  :root { --page: #12171d; --card: #1b222b; --ink: #e8ecf1; --soft: #a6b1bd; --line: #313b47; --accent: #8abbf0; }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.75rem 0 0.9rem; }
h3 { font-size: 0.95rem; margin: 0 0 0.5rem; }
.sub { color: var(--soft); margin: 0.2rem 0 0; overflow-wrap: anywhere; }
.lead { max-width: 46rem; font-size: 1.08rem; margin: 1.1rem 0 1.6rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 1rem; }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 1rem 1.1rem; }
.tile dt { color: var(--soft); font-size: 0.85rem; }
.tile dd { margin: 0; }
.tile .value { font-size: 1.85rem; font-weight: 650; line-height: 1.25; color: var(--accent);
  font-variant-numeric: tabular-nums; }
.tile .value.missing { font-size: 1.25rem; line-height: 1.85; color: var(--soft); font-weight: 500; }
.tile .detail { color: var(--soft); font-size: 0.85rem; }
.figures { columns: 2; column-gap: 1rem; }
figure { margin: 0 0 1rem; padding: 0.9rem 1rem; background: #ffffff; color: #1a232e; border: 1px solid var(--line);
  border-radius: 10px; break-inside: avoid; }
figure.wide { column-span: all; margin-top: 1rem; }
figure h3 { margin: 0; }
figcaption { color: #52606d; font-size: 0.85rem; margin-bottom: 0.5rem; }
figure svg { display: block; width: 100%; height: auto; }
.tables { columns: 2; column-gap: 1rem; }
.card { padding: 0.9rem 1rem; margin: 0 0 1rem; break-inside: avoid; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.81rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.32rem 0.35rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
tbody tr:last-child > * { border-bottom: 0; }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; }
td { white-space: pre; }
.text { text-align: left; white-space: normal; overflow-wrap: break-word; }
th:first-child, td:first-child { padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
pre { margin: 0; padding: 0.9rem 1rem; overflow-x: auto;
  font: 0.82rem/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
code { overflow-wrap: anywhere; }
ul { margin: 0; padding-left: 1.2rem; max-width: 50rem; }
@media (max-width: 820px) { .figures, .tables { columns: 1; } }
@media print { body { background: #fff; } main { max-width: none; padding: 0; } }
</style>
</head>
<body>
<main>
<header>
<h1>{{ title }}</h1>
<p class="sub">{{ subtitle | join(" \N{MIDDLE DOT} ") }}</p>
<p class="lead">{{ sentence }}</p>
</header>
<dl class="tiles">
{% for tile in tiles %}
<div class="tile"><dt>{{ tile.title }}</dt>
<dd class="value{{ ' missing' if tile.value == missing }}">{{ tile.value }}</dd>
<dd class="detail">{{ tile.detail }}</dd></div>
{% endfor %}
</dl>
<p class="sub">{{ machine }}</p>
{% if notes %}
<h2>Notes</h2>
<ul>
{% for note in notes %}
<li>{{ note }}</li>
{% endfor %}
</ul>
{% endif %}
{% if pictures %}
<h2>Pictures</h2>
<div class="figures">
{% for picture, svg in pictures %}
<figure{% if picture.wide %} class="wide"{% endif %} role="group" aria-label="{{ picture.title }}">
<h3>{{ picture.title }}</h3>
<figcaption>{{ picture.caption }}</figcaption>
{{ svg }}
</figure>
{% endfor %}
</div>
{% endif %}
<h2>Tables</h2>
<div class="tables">
{% for table in tables %}
<section class="card"><h3>{{ table.title }}</h3>
<div class="scroll"><table>
{% if table.header %}
<thead><tr>
{% for cell in table.header %}
<th scope="col"{% if loop.index <= table.text_columns %} class="text"{% endif %}>{{ cell }}</th>
{% endfor %}
</tr></thead>
{% endif %}
<tbody>
{% for row in table.rows %}
<tr>
{% for cell in row %}
<td{% if loop.index <= table.text_columns %} class="text"{% endif %}>{{ cell }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody></table></div></section>
{% endfor %}
</div>
{% if recipe or recipe_hash %}
<h2>Recipe</h2>
{% if recipe_hash %}
<p class="sub"><code>{{ recipe_hash }}</code></p>
{% endif %}
{% if recipe %}
<div class="card" style="padding: 0"><pre>{{ recipe }}</pre></div>
{% endif %}
{% endif %}
</main>
</body>
</html>
"""
