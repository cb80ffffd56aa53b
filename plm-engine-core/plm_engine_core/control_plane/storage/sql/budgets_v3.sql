-- Reserving and charging, with fewer statements than version 2 and the same answers. Rows are locked in the order of the
-- command, from narrow to wide: the widest one is hot. What changes no amount locks nothing: an entry of zero is only
-- looked at when reserving, and left alone when charging zero.

-- Sets every amount aside, or none. Answers {"reserved": [...]}, the entries with the window they fell in, or a refusal
-- that names the budget which was too small.
CREATE FUNCTION engine_reserve_v3(p_tenant uuid, p_reserve jsonb) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_each  record;
    v_taken boolean;
    v_done  jsonb := '[]';
BEGIN
    FOR v_each IN
        SELECT e.value AS entry, r.scope_kind, r.scope_id, r.unit, r.amount, COALESCE(r.period, 'total') AS period,
               CASE WHEN COALESCE(r.period, 'total') = 'total' THEN to_timestamp(0)
                    ELSE date_trunc(r.period, clock_timestamp(), 'UTC') END AS starts_at
        FROM jsonb_array_elements(p_reserve) AS e,
             jsonb_to_record(e.value) AS r (scope_kind text, scope_id uuid, unit text, period text, amount numeric)
    LOOP
        FOR v_try IN 1..2 LOOP
            IF v_each.amount = 0 THEN
                PERFORM FROM budgets
                    WHERE tenant_id = p_tenant AND scope_kind = v_each.scope_kind AND scope_id = v_each.scope_id
                      AND unit = v_each.unit AND period = v_each.period AND starts_at = v_each.starts_at
                      AND spent + reserved <= limit_amount;
            ELSE
                UPDATE budgets SET reserved = reserved + v_each.amount
                    WHERE tenant_id = p_tenant AND scope_kind = v_each.scope_kind AND scope_id = v_each.scope_id
                      AND unit = v_each.unit AND period = v_each.period AND starts_at = v_each.starts_at
                      AND spent + reserved + v_each.amount <= limit_amount;
            END IF;
            v_taken := FOUND;
            EXIT WHEN v_taken OR v_try = 2 OR v_each.entry ->> 'limit' IS NULL;
            PERFORM engine_open_budget_v2(p_tenant, v_each.entry, v_each.starts_at);
        END LOOP;
        IF NOT v_taken THEN
            PERFORM engine_release_v2(p_tenant, v_done);
            RETURN engine_unaffordable_v2(p_tenant, v_each.entry, v_each.starts_at);
        END IF;
        v_done := v_done || (v_each.entry || jsonb_build_object('starts_at', v_each.starts_at));
    END LOOP;
    RETURN jsonb_build_object('reserved', v_done);
END
$$;

-- Turns the reservations of a grant into spend: `p_charges` maps units to amounts; a unit left out is charged as
-- reserved. Answers {"spent": amount per unit, as texts that keep every digit; "overrun": whether any charge was more than
-- its reservation}. The same order of locks as reserving.
CREATE FUNCTION engine_charge_v3(p_tenant uuid, p_grant uuid, p_charges jsonb) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_each    record;
    v_spent   jsonb := '{}';
    v_overrun boolean := false;
BEGIN
    FOR v_each IN
        WITH charged AS (
            UPDATE reservations SET settled = COALESCE((p_charges ->> unit)::numeric, amount)
                WHERE tenant_id = p_tenant AND grant_id = p_grant
                RETURNING position, scope_kind, scope_id, unit, period, starts_at, amount, settled)
        SELECT * FROM charged ORDER BY position
    LOOP
        IF v_each.amount <> 0 OR v_each.settled <> 0 THEN
            UPDATE budgets SET reserved = reserved - v_each.amount, spent = spent + v_each.settled
                WHERE tenant_id = p_tenant AND scope_kind = v_each.scope_kind AND scope_id = v_each.scope_id
                  AND unit = v_each.unit AND period = v_each.period AND starts_at = v_each.starts_at;
        END IF;
        v_overrun := v_overrun OR v_each.settled > v_each.amount;
        v_spent := v_spent || jsonb_build_object(v_each.unit, trim_scale(v_each.settled)::text);
    END LOOP;
    RETURN jsonb_build_object('spent', v_spent, 'overrun', v_overrun);
END
$$;
