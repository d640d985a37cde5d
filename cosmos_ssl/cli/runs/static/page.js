
'use strict';
const $=id=>document.getElementById(id),all=(query,of=document)=>[...of.querySelectorAll(query)];
const data=JSON.parse($('data').textContent);
const make=(tag,given={},...inner)=>{const made=Object.assign(document.createElement(tag),given);made.append(...inner);return made};

// ---- what is chosen: kept in the address, so that a page that renews itself, or is sent on, shows the same
const asked=new URLSearchParams(location.hash.slice(1));
const state={
  off:new Set(asked.getAll('off')),x:asked.get('x')||'steps',lx:asked.has('lx'),ly:asked.has('ly'),
  smooth:Number(asked.get('smooth'))||0,kind:asked.get('kind'),at:asked.get('at'),paused:asked.has('paused'),
  charts:asked.getAll('chart').filter(name=>data.metrics.includes(name)),sort:{}};
if(!state.charts.length)state.charts=data.charts.slice();
for(const text of asked.getAll('sort')){const [table,way,...key]=text.split(' ');state.sort[table]=[key.join(' '),way]}
function keep(){
  const told=new URLSearchParams();
  for(const name of state.off)told.append('off',name);
  if(state.x!=='steps')told.set('x',state.x);
  if(state.lx)told.set('lx','1');
  if(state.ly)told.set('ly','1');
  if(state.smooth)told.set('smooth',state.smooth);
  if(state.charts.join('\n')!==data.charts.join('\n'))for(const name of state.charts)told.append('chart',name);
  if(state.kind)told.set('kind',state.kind);
  if(state.at)told.set('at',state.at);
  if(state.paused)told.set('paused','1');
  for(const [table,[key,way]] of Object.entries(state.sort))told.append('sort',[table,way,key].join(' '));
  try{history.replaceState(null,'','#'+told)}catch{location.hash=told}
}
const isOn=number=>!state.off.has(data.runs[number].name);

// ---- tables: a head's button sorts; what has no value stays at the end
function sort(table,key,way){
  const heads=all('thead th',table),column=heads.findIndex(head=>head.dataset.key===key);
  if(column<0)return;
  heads.forEach((head,n)=>head.setAttribute('aria-sort',n===column?way:'none'));
  const value=row=>row.cells[column].dataset.v,rows=[...table.tBodies[0].rows];
  const numbers=rows.every(row=>value(row)===undefined||value(row)!==''&&!isNaN(value(row)));
  const order=numbers?(a,b)=>a-b:(a,b)=>a.localeCompare(b,'en',{numeric:true}),turn=way==='ascending'?1:-1;
  rows.sort((a,b)=>{
    const x=value(a),y=value(b);
    return x===undefined||y===undefined?(x===undefined)-(y===undefined):turn*order(x,y);
  });
  table.tBodies[0].append(...rows);
}
for(const table of all('table')){
  for(const head of all('thead th',table))head.firstChild.onclick=()=>{
    const other={ascending:'descending',descending:'ascending'}[head.getAttribute('aria-sort')];
    state.sort[table.id]=[head.dataset.key,other||head.dataset.first];
    sort(table,...state.sort[table.id]);keep();
  };
  if(state.sort[table.id])sort(table,...state.sort[table.id]);
}

// ---- curves
const known=new Map();
function unpacked(text,kind){
  const raw=atob(text),bytes=new Uint8Array(raw.length);
  for(let n=0;n<raw.length;n++)bytes[n]=raw.charCodeAt(n);
  return new kind(bytes.buffer);
}
function curves(metric){  // of each run {steps,values,middles,means}, or null; unpacked when first drawn
  if(!known.has(metric))known.set(metric,JSON.parse($('m'+data.metrics.indexOf(metric)).textContent).map(one=>{
    if(!one)return null;
    const steps=unpacked(one.s,Uint32Array),values=unpacked(one.v,Float32Array);
    return {steps,values,middles:one.t?unpacked(one.t,Uint32Array):steps,means:one.m?unpacked(one.m,Float32Array):values};
  }));
  return known.get(metric);
}
function unit(run){  // what a step comes to on the axis across; null where that is not known
  return state.x==='steps'?1:!run.batch?null:state.x==='samples'?run.batch:run.flops?run.batch*run.flops:null;
}
function smoothed(values){  // moving average, without the pull of its start towards 0
  let sum=0,weight=0;
  return Array.from(values,value=>{
    sum=sum*state.smooth+(1-state.smooth)*value;weight=weight*state.smooth+1-state.smooth;
    return sum/weight;
  });
}
const short=new Intl.NumberFormat('en',{notation:'compact',maximumFractionDigits:2});
const shown=value=>{
  const size=Math.abs(value);
  return size>=1e15||size>0&&size<1e-3?value.toExponential(2).replace(/\.?0+e/,'e'):size>=1e4?short.format(value):String(+value.toPrecision(4));
};
const colour=name=>getComputedStyle(document.documentElement).getPropertyValue(name).trim();

class Chart{
  constructor(metric){
    this.metric=metric;
    this.select=make('select');
    for(const name of data.metrics)this.select.append(make('option',{value:name,textContent:name}));
    this.select.value=metric;
    this.select.onchange=()=>{this.metric=this.select.value;state.charts=charts.map(chart=>chart.metric);keep();this.draw()};
    this.remove=make('button',{type:'button',textContent:'\u2715'});
    this.remove.onclick=()=>{
      charts.splice(charts.indexOf(this),1);this.box.remove();this.plot?.destroy();
      state.charts=charts.map(chart=>chart.metric);keep();number();$('add').focus();
    };
    this.place=make('div',{className:'plot',tabIndex:0});
    this.place.setAttribute('role','img');
    this.place.onkeydown=event=>this.key(event);
    this.values=make('p',{className:'values'});
    this.values.setAttribute('aria-live','polite');
    this.box=make('div',{className:'chart'},make('div',{className:'head'},this.select,this.remove),this.place,this.values);
  }
  lines(){  // {run,x,y,bold,points} to draw, in the order of runs
    const found=[];
    curves(this.metric).forEach((curve,number)=>{
      const run=data.runs[number],step=unit(run);
      if(!curve||!isOn(number)||step===null)return;
      const add=(steps,values,bold)=>{
        const x=[],y=[];
        for(let n=0;n<steps.length;n++)if((!state.lx||steps[n]>0)&&(!state.ly||values[n]>0)){x.push(steps[n]*step);y.push(values[n])}
        if(x.length)found.push({run,number,x,y,bold});
      };
      if(state.smooth){add(curve.steps,curve.values,false);add(curve.middles,smoothed(curve.means),true)}
      else add(curve.steps,curve.values,true);
    });
    return found;
  }
  draw(){
    this.plot?.destroy();this.plot=null;this.values.textContent='';
    this.drawn=this.lines();
    const runs=new Set(this.drawn.map(line=>line.number)).size;
    this.place.dataset.runs=runs;
    this.place.setAttribute('aria-label',`${this.metric} over ${state.x} of ${runs} runs. The arrow keys move along it.`);
    if(!this.drawn.length){this.place.textContent=state.lx||state.ly?'No run that is on has such values above 0.':'No run that is on has this metric over '+state.x+'.';return}
    this.place.textContent='';
    const ink=colour('--soft'),rule=colour('--line'),axis=(size,label)=>({
      stroke:ink,font:'12px system-ui, sans-serif',labelFont:'12px system-ui, sans-serif',size,label,labelSize:label?18:0,
      grid:{stroke:rule,width:1},ticks:{stroke:rule,width:1},values:(plot,splits)=>splits.map(value=>value===null?'':shown(value))});
    const across=(plot,low,high)=>low===null?[null,null]:low<high?[low,high]:state.lx?[low/2,low*2]:[low-1,low+1];
    this.plot=new uPlot({
      width:this.width(),height:300,legend:{show:false},cursor:{points:{show:false},drag:{x:true,y:false}},
      scales:{x:{time:false,distr:state.lx?3:1,range:across},y:{distr:state.ly?3:1}},
      axes:[axis(46,state.x),axis(58)],
      series:[{},...this.drawn.map(line=>({
        stroke:line.run.colour,dash:line.run.dash,width:line.bold?1.75:1,alpha:line.bold?1:.3,spanGaps:true,
        points:{show:line.bold&&line.x.length<=40,size:6,stroke:line.run.colour,fill:line.run.colour}}))],
      hooks:{setCursor:[plot=>this.tell(plot)]},
    },uPlot.join(this.drawn.map(line=>[line.x,line.y])),this.place);
    this.tell(this.plot);
  }
  width(){return Math.max(200,this.place.clientWidth)}
  resize(){if(this.plot&&this.plot.width!==this.width())this.plot.setSize({width:this.width(),height:300})}
  tell(plot){  // the values nearest to the cursor; without one, the last
    this.values.textContent='';
    const left=plot.cursor.left,x=left===undefined||left<0?Infinity:plot.posToVal(left,'x'),near=[];
    for(const line of this.drawn)if(line.bold){
      let low=0,high=line.x.length-1;
      while(high-low>1){const mid=low+high>>1;line.x[mid]<x?low=mid:high=mid}
      const n=x<=(line.x[low]+line.x[high])/2?low:high;
      near.push([line.y[n],line,line.x[n]]);
    }
    near.sort((a,b)=>b[0]-a[0]);
    for(const [value,line,at] of near.slice(0,12)){
      const dot=make('i');dot.style.background=line.run.colour;
      this.values.append(make('span',{},dot,`${line.run.name} ${shown(value)} at ${shown(at)}`));
    }
    if(near.length>12)this.values.append(`and ${near.length-12} more`);
  }
  key(event){
    if(!this.plot)return;
    const wide=this.plot.over.clientWidth,step=Math.max(1,wide/50),left=this.plot.cursor.left??-1;
    const to={ArrowLeft:Math.max(0,left-step),ArrowRight:Math.min(wide-1,left<0?0:left+step),Home:0,End:wide-1,Escape:-10}[event.key];
    if(to===undefined)return;
    event.preventDefault();
    this.plot.setCursor({left:to,top:to<0?-10:this.plot.over.clientHeight/2});
  }
}
const charts=[];
function number(){charts.forEach((chart,n)=>{
  chart.select.setAttribute('aria-label','metric of chart '+(n+1));chart.remove.setAttribute('aria-label','remove chart '+(n+1));
})}
function add(metric){const chart=new Chart(metric);charts.push(chart);$('charts').append(chart.box);number();return chart}
function draw(){
  for(const chart of charts)chart.draw();
  const out=data.runs.filter((run,n)=>isOn(n)&&unit(run)===null).map(run=>run.name);
  const why=state.x==='FLOPs'?'their FLOPs a sample are not known (cosmos-ssl runs --flops counts them)':'their batch size is not known';
  if($('left-out'))$('left-out').textContent=out.length?`Left out, for ${why}: ${out.slice(0,8).join(', ')}${out.length>8?` and ${out.length-8} more`:''}.`:'';
}

// ---- pictures
let images=null;
function pictures(){
  if(!$('kind'))return;
  images??=JSON.parse($('images').textContent);
  const kind=$('kind').value,steps=[...new Set(images.flatMap(run=>Object.keys(run[kind]||{}).map(Number)))].sort((a,b)=>a-b);
  const wanted=state.at===null?-1:steps.findLastIndex(step=>step<=Number(state.at)),place=wanted<0?steps.length-1:wanted;
  $('at').max=steps.length-1;$('at').value=place;$('at-step').textContent=steps[place].toLocaleString('en');
  $('at').setAttribute('aria-valuetext','step '+steps[place]);
  $('gallery').replaceChildren(...images.flatMap((run,n)=>{
    const own=Object.keys(run[kind]||{}).map(Number).filter(step=>step<=steps[place]).sort((a,b)=>b-a)[0];
    if(!isOn(n))return [];
    const name=data.runs[n].name;
    if(own===undefined)return [make('figure',{},make('figcaption',{textContent:name+': none up to this step'}))];
    const told=`${name}, step ${own.toLocaleString('en')}`,image=make('img',{src:run[kind][own],alt:`${kind} of ${told}`});
    const button=make('button',{type:'button'},image);
    button.setAttribute('aria-label',`enlarge ${kind} of ${told}`);
    button.onclick=()=>{const box=document.querySelector('dialog');box.lastChild.src=image.src;box.lastChild.alt=image.alt;box.showModal()};
    return [make('figure',{},make('figcaption',{textContent:told}),button)];
  }));
  steps_of=steps;
}
let steps_of=[];
document.querySelector('dialog button').onclick=()=>document.querySelector('dialog').close();
if($('kind')){
  if(all('option',$('kind')).some(option=>option.value===state.kind))$('kind').value=state.kind;
  $('kind').onchange=()=>{state.kind=$('kind').value;keep();pictures()};
  $('at').oninput=()=>{state.at=String(steps_of[$('at').value]);keep();pictures()};
}

// ---- switches
function switched(){
  for(const box of all('input[data-run]'))box.checked=isOn(box.dataset.run);
  for(const part of all('tr[data-run],details[data-run]'))part.classList.toggle('away',!isOn(part.dataset.run));
  draw();
  if(images)pictures();
}
for(const box of all('input[data-run]'))box.onchange=()=>{
  const name=data.runs[box.dataset.run].name;
  box.checked?state.off.delete(name):state.off.add(name);
  keep();switched();
};
$('on').onclick=()=>{state.off.clear();keep();switched()};
$('off').onclick=()=>{for(const run of data.runs)state.off.add(run.name);keep();switched()};
if($('charts')){
  for(const radio of all('input[name=x]')){
    radio.checked=radio.value===state.x;
    radio.onchange=()=>{state.x=radio.value;keep();draw()};
  }
  for(const [id,key] of [['log-x','lx'],['log-y','ly']]){
    $(id).checked=state[key];
    $(id).onchange=()=>{state[key]=$(id).checked;keep();draw()};
  }
  const tell=()=>$('smooth-at').textContent=state.smooth;
  $('smooth').value=state.smooth;tell();
  let waiting=0;
  $('smooth').oninput=()=>{
    state.smooth=Number($('smooth').value);tell();
    cancelAnimationFrame(waiting);waiting=requestAnimationFrame(()=>{keep();draw()});
  };
  $('add').onclick=()=>{
    const chart=add(data.metrics.find(name=>!charts.some(chart=>chart.metric===name))||data.metrics[0]);
    chart.draw();state.charts=charts.map(chart=>chart.metric);keep();chart.select.focus();
  };
  for(const metric of state.charts)add(metric);
  new ResizeObserver(()=>{for(const chart of charts)chart.resize()}).observe($('charts'));
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change',draw);
}
switched();
new IntersectionObserver((seen,watch)=>{if(seen.some(one=>one.isIntersecting)){watch.disconnect();pictures()}},{rootMargin:'600px'}).observe($('pictures'));
if(data.refresh){
  $('renew').checked=!state.paused;
  $('renew').onchange=()=>{state.paused=!$('renew').checked;keep()};
  setInterval(()=>{if(!state.paused&&!document.querySelector('dialog').open)location.reload()},data.refresh*1000);
}
