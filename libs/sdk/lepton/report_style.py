"""How a report looks, in light and dark. Blue is the stable version, orange the candidate; red harms, green proves."""

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --ink: #1b2330; --dim: #667085; --rule: #e3e7ed;
  --stable: #2f6fd0; --candidate: #e07b16; --against: #cf3a3a; --for: #1f8a55; --mark: #98a2b3; }
@media (prefers-color-scheme: dark) {
  :root { --page: #11151c; --card: #191f29; --ink: #e6eaf1; --dim: #98a4b6; --rule: #2b3442;
    --stable: #6ea4f5; --candidate: #f3a04a; --against: #f07878; --for: #57c78d; --mark: #5d6b80; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; margin: 0; line-height: 1.3; } h1 small { font-size: 17px; font-weight: 400; color: var(--dim); }
h2 { font-size: 18px; margin: 0 0 10px; }
.lead { font-size: 17px; margin: 6px 0 20px; }
.pill { font-size: 14px; font-weight: 600; padding: 3px 12px; border-radius: 99px; color: #fff; background: #b7791f;
  vertical-align: 4px; margin-left: 8px; white-space: nowrap; }
.pill.promoted { background: #1f8a55; } .pill.rolled_back, .pill.failed, .pill.failing { background: #cf3a3a; }
section, figure { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; margin: 0 0 16px;
  padding: 16px 20px; overflow-x: auto; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 8px 28px;
  margin: 0 0 16px; }
dl div { display: flex; gap: 10px; } dt { color: var(--dim); min-width: 62px; }
  dd { margin: 0; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; white-space: nowrap; }
thead th { color: var(--dim); font-size: 13px; font-weight: 500; }
td, th { padding: 5px 14px 5px 0; vertical-align: top; }
tbody tr + tr > * { border-top: 1px solid var(--rule); }
.numbers td, .numbers thead th + th { text-align: right; white-space: nowrap; }
.swatch { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 8px; }
.swatch.stable { background: var(--stable); } .swatch.candidate { background: var(--candidate); }
.decisions .number { color: var(--dim); } .decisions .when, .decisions .what { white-space: nowrap; }
.what { font-weight: 600; } .what.roll_back, .what.rolled_back, .what.failing, .what.failed { color: var(--against); }
.what.step, .what.promoted { color: var(--for); }
details summary { cursor: pointer; color: var(--dim); } details table { font-size: 13px; width: auto; }
details details { margin: 0; } td details { font-size: 13px; }
td.passed { color: var(--for); } td.failed { color: var(--against); } td.waiting { color: var(--candidate); }
.dim { color: var(--dim); }
pre { overflow-x: auto; font: 13px/1.5 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 4px 20px; font-size: 13px;
  align-items: baseline; color: var(--dim); margin-bottom: 6px; }
h3 { font-size: 15px; margin: 0; color: var(--ink); } h3 small { font-size: 13px; font-weight: 400; color: var(--dim);
  margin-left: 10px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; } .legend span { white-space: nowrap; color: var(--ink); }
.key { display: inline-block; width: 22px; margin-right: 6px; vertical-align: 4px; border-top: 3px solid var(--mark); }
.key.stable { border-color: var(--stable); } .key.candidate { border-color: var(--candidate); }
.key.against { border-color: var(--against); } .key.for { border-color: var(--for); }
.key.dashed, .key.dash1 { border-top-style: dashed; } .key.dash2 { border-top-style: dotted; }
.key.dash3 { border-top-style: double; }
.key.none { display: none; }
.key.band { border-top: 9px solid var(--mark); opacity: .35; vertical-align: 1px; border-radius: 2px; }
svg { display: block; width: 100%; min-width: 640px; height: auto; font-family: inherit; }
text { fill: var(--ink); font-size: 12px; }
text.tick { fill: var(--dim); } .grid { stroke: var(--rule); } .axis { stroke: var(--mark); }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.line.stable { stroke: var(--stable); } .line.candidate { stroke: var(--candidate); }
.line.against { stroke: var(--against); } .line.for { stroke: var(--for); }
.line.dashed { stroke-dasharray: 6 4; stroke-width: 1.6; }
.line.dash1 { stroke-dasharray: 7 4; } .line.dash2 { stroke-dasharray: 2 4; } .line.dash3 { stroke-dasharray: 9 3 2 3; }
.dot.stable { fill: var(--stable); } .dot.candidate { fill: var(--candidate); }
.dot.against { fill: var(--against); } .dot.for { fill: var(--for); }
.area.stable { fill: var(--stable); opacity: .22; } .area.candidate { fill: var(--candidate); opacity: .9; }
.band { opacity: .18; } .band.stable { fill: var(--stable); } .band.candidate { fill: var(--candidate); }
.whisker { opacity: .4; stroke-width: 6; } .whisker.stable { stroke: var(--stable); }
.whisker.candidate { stroke: var(--candidate); }
.threshold { stroke-dasharray: 3 3; }
  .threshold.against { stroke: var(--against); } .threshold.for { stroke: var(--for); }
.label { font-size: 12px; } .label.against { fill: var(--against); } .label.for { fill: var(--for); }
.mark { stroke: var(--mark); stroke-dasharray: 2 3; }
.badge { fill: var(--mark); } .badge-text { fill: var(--card); font-size: 11px; font-weight: 600; }
.hint { fill: transparent; } .hint:hover { fill: var(--mark); fill-opacity: .15; }
"""
