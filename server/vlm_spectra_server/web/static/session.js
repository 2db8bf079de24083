// Who asks: on a server that wants a token, a dialogue for it. The browser keeps a cookie that no script can read.

import { $ } from "./dom.js";
import { get, post, remove, wanting } from "./api.js";

/** Asks for a token where one is wanted; whether the page may go on. */
export async function signedIn() {
  wanting.signIn = ask;
  $("sign-in-form").addEventListener("submit", (event) => { event.preventDefault(); signIn(); });
  $("sign-in").addEventListener("cancel", (event) => event.preventDefault()); // nothing can be done without
  $("sign-in").addEventListener("close", ask); // Chromium closes it all the same when Escape is pressed again
  $("sign-out").addEventListener("click", signOut);
  const { required, signed_in: signed, name } = await get("/api/session");
  $("sign-out").hidden = !(required && signed);
  $("sign-out").title = name ? `signed in as ${name}` : "";
  if (required && !signed) ask();
  return signed || !required;
}

function ask() {
  if ($("sign-in").open) return;
  $("sign-in").showModal();
  $("token").focus();
}

async function signIn() {
  $("refused").hidden = true;
  try {
    await post("/api/session", { token: $("token").value.trim() });
    location.reload(); // the link holds what was asked
  } catch (error) {
    $("refused").textContent = error.message;
    $("refused").hidden = false;
    $("token").select();
  }
}

async function signOut() {
  await remove("/api/session");
  location.reload();
}
