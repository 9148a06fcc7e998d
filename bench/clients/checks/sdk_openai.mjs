// The openai package of npm: `node sdk_openai.mjs URL PICTURE`.
import OpenAI from "openai";

const [url, picture] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const model = (await client.models.list()).data[0].id;
const part = { type: "image_url", image_url: { url: `data:image/png;base64,${picture}` } };
const tool = {
  name: "get_weather",
  parameters: { type: "object", properties: { city: { type: "string" } } },
};

function asked(images = 0, options = {}) {
  const text = { type: "text", text: "What is this?" };
  const content = images ? [text, ...Array(images).fill(part)] : text.text;
  return { model, messages: [{ role: "user", content }], max_tokens: 4, ...options };
}

async function chat(images = 0, options = {}) {
  const done = await client.chat.completions.create(asked(images, options));
  const [first] = done.choices;
  const { prompt_tokens: prompt, completion_tokens: answer } = done.usage;
  const words = `${(first.message.content ?? "").length} characters, ${first.finish_reason}`;
  return `${done.choices.length} x (${words}), ${prompt} + ${answer} tokens`;
}

async function stream(images = 0) {
  let text = "";
  let reason = null;
  for await (const event of await client.chat.completions.create(asked(images, { stream: true }))) {
    text += event.choices[0]?.delta?.content ?? "";
    reason = event.choices[0]?.finish_reason ?? reason;
  }
  return `${text.length} characters, ${reason}`;
}

async function responses() {
  const done = await client.responses.create({ model, input: "Hello", max_output_tokens: 4 });
  return `${done.output_text.length} characters, ${done.status}`;
}

const checks = {
  text: () => chat(),
  stream: () => stream(),
  image: () => chat(1),
  "image, stream": () => stream(1),
  "three images": () => chat(3),
  tools: () => chat(0, { tools: [{ type: "function", function: tool }] }),
  "n = 9": () => chat(0, { n: 9 }),
  responses,
  "error: temperature 3": () => chat(0, { temperature: 3 }),
  "error: unknown model": () => chat(0, { model: "none" }),
};

for (const [check, run] of Object.entries(checks)) {
  let seen;
  let said = "";
  try {
    seen = await run();
  } catch (error) {
    seen = `${error.constructor.name}${error.status ? ` ${error.status}` : ""}`;
    said = String(error.message).slice(0, 400);
  }
  console.log(JSON.stringify({ check, seen, said }));
}
