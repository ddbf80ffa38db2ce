/** Names of providers, loaded once: rows elsewhere carry only ids. */
import { api } from "./api/client";
import { Loaded } from "./loaded.svelte";

const providers = new Loaded(api.providers);
let asked = false;

/** The provider's name, or its id as long as nothing better is known. */
export function providerName(id: string): string {
  if (!asked) {
    asked = true;
    void providers.refresh().then(() => (asked = providers.value !== null));
  }
  return providers.value?.find((p) => p.id === id)?.name ?? id;
}
