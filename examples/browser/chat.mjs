// Text in, text out: the bundle's own tokenizer and chat template.

import { Template } from "@huggingface/jinja";
import { Tokenizer } from "@huggingface/tokenizers";
import { readJson } from "./generate.mjs";

/**
 * The tokenizer of a bundle.
 *
 * @param {string} folder where the bundle is, as a URL that ends with a slash.
 * @returns {Promise<{prompt: (question: string) => number[], text: (ids: number[]) => string, end: number[]}>}
 *   the ids of a question as the model expects it; the text of ids; the tokens that end an answer.
 */
export async function openTokenizer(folder) {
  const [tokenizer, settings, generation, template] = await Promise.all([
    readJson(`${folder}tokenizer.json`),
    readJson(`${folder}tokenizer_config.json`),
    readJson(`${folder}generation_config.json`),
    chatTemplate(folder),
  ]);
  const made = new Tokenizer(tokenizer, settings);
  const words = { bos_token: content(settings.bos_token), eos_token: content(settings.eos_token) };
  return {
    prompt: (question) => {
      if (template === null) return made.encode(question).ids;
      const messages = [{ role: "user", content: question }];
      const text = new Template(template).render({ ...words, messages, add_generation_prompt: true });
      // A chat template writes the first token itself.
      return made.encode(text, { add_special_tokens: false }).ids;
    },
    text: (ids) => made.decode(ids, { skip_special_tokens: true }),
    end: [generation.eos_token_id ?? []].flat(),
  };
}

async function chatTemplate(folder) {
  const response = await fetch(`${folder}chat_template.jinja`);
  return response.ok ? response.text() : null;
}

/** A special token's text: files have it as such, or with how it is to be stripped. */
function content(token) {
  return token?.content ?? token ?? "";
}
